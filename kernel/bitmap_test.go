// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func newRand(t *testing.T) *rand.Rand {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	t.Logf("seed %d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// wantModel holds every question to a bitmap against a plain slice.
func wantModel(t *testing.T, b *Bitmap, model []bool) {
	t.Helper()
	count, set, clean := int64(0), b.Blocks(), b.Blocks()
	for i := b.Blocks() - 1; i >= 0; i-- {
		if model[i] {
			count, set = count+1, i
		} else {
			clean = i
		}
		if b.Get(i) != model[i] || b.NextSet(i) != set || b.NextClear(i) != clean {
			t.Fatalf("at %d of %d: marked %v, next marked %d, next clean %d; want %v, %d, %d",
				i, b.Blocks(), b.Get(i), b.NextSet(i), b.NextClear(i), model[i], set, clean)
		}
	}
	if b.Count() != count {
		t.Fatalf("%d blocks are marked, want %d", b.Count(), count)
	}
	if b.NextSet(b.Blocks()) != b.Blocks() || b.NextClear(b.Blocks()+5) != b.Blocks() {
		t.Fatal("there is something behind the end")
	}
}

func TestBitmapEqualsModel(t *testing.T) {
	rng := newRand(t)
	for range 300 {
		blocks := rng.Int64N(400)
		b, other := NewBitmap(blocks), NewBitmap(blocks)
		model := make([]bool, blocks)
		for range rng.IntN(12) {
			if blocks == 0 {
				continue
			}
			first := rng.Int64N(blocks)
			last := first + rng.Int64N(blocks-first)
			target := b
			if rng.IntN(2) == 0 {
				target = other
			}
			target.SetRange(first, last)
			target.Set(first)
			for i := first; i <= last; i++ {
				model[i] = true
			}
		}
		before := other.Clone()
		if err := b.Or(other); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(before.Words(), other.Words()) {
			t.Fatal("uniting changed the other bitmap")
		}
		wantModel(t, b, model)
		wantExtents(t, b, model)
	}
}

// wantExtents goes to bytes and back.
func wantExtents(t *testing.T, b *Bitmap, model []bool) {
	t.Helper()
	size := max(0, b.Blocks()*BlockSize-1000) // the last block is short
	extents := b.Extents(size)
	back := NewBitmap(b.Blocks())
	for i, e := range extents {
		if err := e.Validate(size); err != nil {
			t.Fatal(err)
		}
		if i > 0 && extents[i-1].End() >= e.Offset {
			t.Fatalf("extents %v and %v touch", extents[i-1], e)
		}
		back.SetRange(e.Offset/BlockSize, (e.End()-1)/BlockSize)
	}
	wantModel(t, back, model)
	if aligned := Align(slices.Clone(extents), size); !slices.Equal(aligned, extents) {
		t.Fatalf("aligned %v to %v", extents, aligned)
	}
}

func TestSetRangeBackwardsMarksNothing(t *testing.T) {
	b := NewBitmap(100)
	b.SetRange(70, 3)
	if b.Count() != 0 {
		t.Fatalf("%d blocks are marked", b.Count())
	}
}

func TestTrimClearsBehindTheEndOnly(t *testing.T) {
	for _, blocks := range []int64{0, 1, 63, 64, 65, 128} {
		b := NewBitmap(blocks)
		for i := range b.Words() {
			b.Words()[i] = ^uint64(0)
		}
		b.Trim()
		if b.Count() != blocks {
			t.Errorf("%d blocks: %d are marked", blocks, b.Count())
		}
	}
}

func TestOrOfAnotherSizeIsAnError(t *testing.T) {
	if err := NewBitmap(64).Or(NewBitmap(65)); err == nil {
		t.Fatal("united bitmaps of two sizes")
	}
}

func TestBlocksOfCountsTheShortLastBlock(t *testing.T) {
	for size, want := range map[int64]int64{0: 0, 1: 1, 4096: 1, 4097: 2, 4 << 40: 1 << 30} {
		if got := BlocksOf(size); got != want {
			t.Errorf("%d bytes: %d blocks, want %d", size, got, want)
		}
	}
}
