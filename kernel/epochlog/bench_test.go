// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/RoaringBitmap/roaring/v2"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// BenchmarkEntry encodes epochs of 64 GiB: single blocks at random, and runs
// of about 64. It reports bytes for each marked block, and what a roaring
// bitmap takes.
func BenchmarkEntry(b *testing.B) {
	const blocks = 64 << 30 / kernel.BlockSize
	for _, run := range []int64{1, 64} {
		for _, marked := range []int64{blocks / 10000, blocks / 100, blocks / 10} {
			b.Run(fmt.Sprintf("run=%d/marked=%d", run, marked), func(b *testing.B) {
				rng := rand.New(rand.NewPCG(1, uint64(run*marked)))
				e := sample()
				e.Bitmap = kernel.NewBitmap(blocks)
				other := roaring.New()
				for n := int64(0); n < marked; n += run {
					first := rng.Int64N(blocks - 2*run)
					last := first + rng.Int64N(2*run)
					e.Bitmap.SetRange(first, last)
					other.AddRange(uint64(first), uint64(last)+1)
				}
				other.RunOptimize()
				size := 0
				for b.Loop() {
					size = len(Encode(e))
				}
				n := float64(e.Bitmap.Count())
				b.ReportMetric(float64(size)/n, "bytes/block")
				b.ReportMetric(float64(other.GetSerializedSizeInBytes())/n, "roaring-bytes/block")
			})
		}
	}
}
