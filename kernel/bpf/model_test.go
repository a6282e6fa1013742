// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// noContext is for what outlives a test's own context.
var noContext = context.Background()

// seed prints the seed of a random test.
func seed(t testing.TB) *rand.Rand {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	t.Logf("seed %d", s)
	return rand.New(rand.NewPCG(s, 0))
}

func wantEqual(t *testing.T, got, want *kernel.Bitmap) {
	t.Helper()
	if got.Equal(want) {
		return
	}
	for i := range want.Blocks() {
		if got.Get(i) != want.Get(i) {
			t.Fatalf("block %d is marked: %v, want %v (%d marked, want %d)", i, got.Get(i), want.Get(i), got.Count(), want.Count())
		}
	}
}

func TestBitmapEqualsAlignedDirectWrites(t *testing.T) {
	device, _ := newLoop(t, 64<<20+512) // the last block is short
	testAlignedWrites(t, device, 64<<20+512, 500)
}

// testAlignedWrites writes to a device of at least 64 MiB.
func testAlignedWrites(t *testing.T, device string, size int64, writes int) {
	tr := track(t, device)
	f := openDirect(t, device)
	rng := seed(t)
	buf := alignedBuffer(1 << 20)
	for range 5 {
		want := kernel.NewBitmap(kernel.BlocksOf(size))
		for range writes {
			first := rng.Int64N(64 << 8)
			n := min(1+rng.Int64N(256), 64<<8-first)
			if _, err := f.WriteAt(buf[:n*kernel.BlockSize], first*kernel.BlockSize); err != nil {
				t.Fatal(err)
			}
			want.SetRange(first, first+n-1)
		}
		if _, err := f.WriteAt(buf[:512], size-512); err != nil {
			t.Fatal(err)
		}
		want.Set(want.Blocks() - 1)
		wantEqual(t, rotate(t, tr), want)
	}
	wantReliable(t, tr)
}
