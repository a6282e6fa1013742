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
	for n := range 300 {
		blocks := rng.Int64N(400)
		if n%10 == 0 {
			blocks = rng.Int64N(4 * chunkBlocks)
		}
		b, other := NewBitmap(blocks), NewBitmap(blocks)
		model := make([]bool, blocks)
		for range rng.IntN(12) {
			if blocks == 0 {
				continue
			}
			first := rng.Int64N(blocks)
			last := first + rng.Int64N(blocks-first)
			if rng.IntN(4) == 0 { // whole chunks
				first, last = first/chunkBlocks*chunkBlocks, min(blocks, (last/chunkBlocks+1)*chunkBlocks)-1
			}
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
		if !before.Equal(other) {
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

func TestWordsMarkNothingBehindTheEnd(t *testing.T) {
	for _, blocks := range []int64{0, 1, 63, 64, 65, 128, chunkBlocks - 1, chunkBlocks, chunkBlocks + 1} {
		b := NewBitmap(blocks)
		for i := range b.Words() {
			b.OrWord(i, ^uint64(0))
		}
		if b.Count() != blocks {
			t.Errorf("%d blocks: %d are marked", blocks, b.Count())
		}
		for i := range b.Words() {
			if w := b.Word(i); w != ^uint64(0) && (i+1 != b.Words() || w != 1<<(blocks%64)-1) {
				t.Errorf("%d blocks: word %d is %x", blocks, i, w)
			}
		}
	}
}

// What one bitmap has wholly marked is the same memory as another's, and what is done to one
// is not done to the other.
func TestBitmapsAreIndependent(t *testing.T) {
	const blocks = 3*chunkBlocks + 100
	all := NewBitmap(blocks)
	all.SetRange(0, blocks-1)
	for name, change := range map[string]func(b *Bitmap){
		"Set":      func(b *Bitmap) { b.Set(chunkBlocks + 5) },
		"SetRange": func(b *Bitmap) { b.SetRange(3, 2*chunkBlocks+7) },
		"OrWord":   func(b *Bitmap) { b.OrWord(chunkWords+3, 5) },
		"Or": func(b *Bitmap) {
			some := NewBitmap(blocks)
			some.Set(chunkBlocks + 9)
			_ = b.Or(some)
		},
		"OrAll": func(b *Bitmap) { _ = b.Or(all) },
	} {
		few := NewBitmap(blocks)
		few.Set(70)
		for _, b := range []*Bitmap{all, few} {
			before, c := b.Count(), b.Clone()
			if !c.Equal(b) {
				t.Fatalf("%s: a copy is not the same", name)
			}
			change(c)
			if b.Count() != before || b != all && c.Equal(b) {
				t.Errorf("%s: a bitmap changed with its copy, or not the copy", name)
			}
			if c.Get(chunkBlocks-1) && NewBitmap(blocks).Count() != 0 {
				t.Errorf("%s: a new bitmap is not clean", name)
			}
		}
	}
	if all.Count() != blocks || NewBitmap(blocks+1).Equal(all) || NewBitmap(blocks).Equal(all) {
		t.Error("what is full is not, or is the same as what is clean")
	}
}

func TestGrownKeepsWhatIsMarked(t *testing.T) {
	rng := newRand(t)
	for range 100 {
		blocks := 1 + rng.Int64N(2*chunkBlocks)
		b := NewBitmap(blocks)
		first := rng.Int64N(blocks)
		b.SetRange(first, first+rng.Int64N(blocks-first))
		g := b.Grown(blocks + rng.Int64N(2*chunkBlocks))
		if g.Count() != b.Count() || g.NextSet(0) != first || g.NextClear(first) != first+b.Count() {
			t.Fatalf("%d blocks, %d from %d: grown has %d from %d", blocks, b.Count(), first, g.Count(), g.NextSet(0))
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
