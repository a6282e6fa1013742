// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
)

// TestWornBlobsOfWhatHasSettledComeLast has two layers of one blob each, of which 2 blocks of 64
// are live in the older one and 6 in the newer.
func TestWornBlobsOfWhatHasSettledComeLast(t *testing.T) {
	const size = 1 << 20
	s, key, r := newStore(t), new(blocksum.Key), rand.New(rand.NewPCG(1, 1))
	img := &image{make([]byte, size)}
	tree := &repo.Tree{}
	// change writes every fourth block from one on, and makes a layer of them.
	change := func(from, n int64) (out []kernel.Extent) {
		for i := range n {
			e := kernel.Extent{Offset: (from + 4*i) * kernel.BlockSize, Length: kernel.BlockSize}
			for j := range img.data[e.Offset:e.End()] {
				img.data[e.Offset+int64(j)] = byte(r.Uint32())
			}
			out = append(out, e)
		}
		write(t, s, tree, Options{Source: img, Size: size, Ranges: ranges(out), Key: key})
		return out
	}
	older, newer := change(0, 64), change(1, 64)
	change(0, 62)
	change(1, 58)
	older, newer = older[62:], newer[58:]

	leastLive := slices.Concat(older, newer[:1])
	for _, c := range []struct {
		settled, blocks int64
		want            []kernel.Extent
	}{
		{0, 3, leastLive},
		{1, 6, newer},
		{1, 8, slices.Concat(older, newer)},
		{1, 3, newer[:3]},
		{2, 3, leastLive},
	} {
		got, err := Worn(t.Context(), s, open(t, s, tree), WornOptions{
			Size: size, Budget: c.blocks * kernel.BlockSize, Percent: 25, Settled: int(c.settled),
		})
		if err != nil {
			t.Fatal(err)
		}
		if want := kernel.Align(slices.Clone(c.want), size); !slices.Equal(got, want) {
			t.Errorf("of %d layers that have settled, %d blocks: %v, want %v", c.settled, c.blocks, got, want)
		}
	}
}
