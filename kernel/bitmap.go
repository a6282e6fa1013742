// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"fmt"
	"math/bits"
)

// Bitmap holds one bit per block of a device: bit i%64 of word i/64 is block
// i, which in memory order of a little-endian machine is also bit i%8 of byte
// i/8, the order in which the kernel hands it out.
type Bitmap struct {
	words  []uint64
	blocks int64
}

// NewBitmap returns a clean bitmap of a device of blocks blocks.
func NewBitmap(blocks int64) *Bitmap {
	return &Bitmap{words: make([]uint64, (blocks+63)/64), blocks: blocks}
}

// BlocksOf is the number of blocks of a device of size bytes; the last may be
// short.
func BlocksOf(size int64) int64 { return (size + BlockSize - 1) / BlockSize }

// Blocks is the number of blocks that the bitmap covers.
func (b *Bitmap) Blocks() int64 { return b.blocks }

// Words gives the bits themselves, for codecs and for filling them from the
// kernel. Bits at and beyond Blocks must stay zero: see [Bitmap.Trim].
func (b *Bitmap) Words() []uint64 { return b.words }

// Trim clears the bits beyond the last block.
func (b *Bitmap) Trim() {
	if r := b.blocks % 64; r != 0 {
		b.words[len(b.words)-1] &= 1<<r - 1
	}
}

// Set marks block i.
func (b *Bitmap) Set(i int64) { b.words[i/64] |= 1 << (i % 64) }

// Get reports whether block i is marked.
func (b *Bitmap) Get(i int64) bool { return b.words[i/64]>>(i%64)&1 == 1 }

// SetRange marks the blocks from first to last, both included.
func (b *Bitmap) SetRange(first, last int64) {
	if first > last {
		return
	}
	fw, lw := first/64, last/64
	head, tail := ^uint64(0)<<(first%64), ^uint64(0)>>(63-last%64)
	if fw == lw {
		b.words[fw] |= head & tail
		return
	}
	b.words[fw] |= head
	for w := fw + 1; w < lw; w++ {
		b.words[w] = ^uint64(0)
	}
	b.words[lw] |= tail
}

// Or adds every block marked in other, which must cover as many blocks.
func (b *Bitmap) Or(other *Bitmap) error {
	if other.blocks != b.blocks {
		return fmt.Errorf("unite bitmaps of %d and %d blocks: the device changed its size", b.blocks, other.blocks)
	}
	for i, w := range other.words {
		if w != 0 { // memory of b that was never used stays so
			b.words[i] |= w
		}
	}
	return nil
}

// Count is the number of marked blocks.
func (b *Bitmap) Count() (n int64) {
	for _, w := range b.words {
		n += int64(bits.OnesCount64(w))
	}
	return n
}

// Clone returns an independent copy.
func (b *Bitmap) Clone() *Bitmap {
	c := NewBitmap(b.blocks)
	for i, w := range b.words {
		if w != 0 {
			c.words[i] = w
		}
	}
	return c
}

// NextSet is the first marked block at or after i, or Blocks if there is none.
func (b *Bitmap) NextSet(i int64) int64 { return b.next(i, 0) }

// NextClear is the first clean block at or after i, or Blocks if there is none.
func (b *Bitmap) NextClear(i int64) int64 { return b.next(i, ^uint64(0)) }

func (b *Bitmap) next(i int64, flip uint64) int64 {
	if i >= b.blocks {
		return b.blocks
	}
	w := i / 64
	word := (b.words[w] ^ flip) >> (i % 64) << (i % 64)
	for word == 0 {
		if w++; w == int64(len(b.words)) {
			return b.blocks
		}
		word = b.words[w] ^ flip
	}
	return min(w*64+int64(bits.TrailingZeros64(word)), b.blocks)
}

// Extents lists the marked ranges of a device of size bytes, in device order
// and as long as they can be. The device's last block may be short.
func (b *Bitmap) Extents(size int64) []Extent {
	var out []Extent
	for i := b.NextSet(0); i < b.blocks; {
		j := b.NextClear(i)
		start, end := i*BlockSize, min(j*BlockSize, size)
		if start < end {
			out = append(out, Extent{start, end - start})
		}
		i = b.NextSet(j)
	}
	return out
}
