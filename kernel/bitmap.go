// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"fmt"
	"math/bits"
)

// Bitmap holds one bit per block of a device. Word i holds blocks 64*i to 64*i+63, the first of
// them in its lowest bit; in the memory of a little-endian machine block i is also bit i%8 of
// byte i/8, the order in which the kernel hands it out.
//
// A bitmap costs, in memory and in each walk over it, what is marked: it is cut into chunks,
// and has none where nothing is marked and a common one where SetRange marked all. Of a device
// of 4 TiB that was written to in 2,000 places, 8 MiB of 128.
//
// Several goroutines may read a bitmap at once; nobody else may while one writes.
type Bitmap struct {
	chunks []*chunk // nil: nothing is marked; [full]: all is
	blocks int64
}

// chunk is the bits of 128 MiB of a device, in a page of memory.
type chunk [chunkWords]uint64

const (
	chunkWords  = 512
	chunkBlocks = chunkWords * 64
)

// full is a chunk of which all is marked. It is shared, which is right as bits are never
// cleared: whoever marks something in it is done.
var full = func() *chunk {
	c := new(chunk)
	for i := range c {
		c[i] = ^uint64(0)
	}
	return c
}()

// NewBitmap returns a clean bitmap of a device of blocks blocks.
func NewBitmap(blocks int64) *Bitmap {
	return &Bitmap{chunks: make([]*chunk, (blocks+chunkBlocks-1)/chunkBlocks), blocks: blocks}
}

// BlocksOf is the number of blocks of a device of size bytes; the last may be
// short.
func BlocksOf(size int64) int64 { return (size + BlockSize - 1) / BlockSize }

// Blocks is the number of blocks that the bitmap covers.
func (b *Bitmap) Blocks() int64 { return b.blocks }

// Words is the number of words that hold the bits.
func (b *Bitmap) Words() int { return int((b.blocks + 63) / 64) }

// Word returns word i, for codecs. Its bits at and beyond Blocks are zero.
func (b *Bitmap) Word(i int) uint64 {
	if c := b.chunks[i/chunkWords]; c != nil {
		return c[i%chunkWords]
	}
	return 0
}

// OrWord marks what is set in w of the blocks of word i; bits at and beyond Blocks mark nothing.
func (b *Bitmap) OrWord(i int, w uint64) {
	b.mustHave(int64(i) * 64)
	if r := b.blocks % 64; r != 0 && int64(i) == b.blocks/64 {
		w &= 1<<r - 1
	}
	if w == 0 {
		return
	}
	if c := b.mutable(int64(i / chunkWords)); c != nil {
		c[i%chunkWords] |= w
	}
}

// mustHave panics if the bitmap has no block i: a mark that goes nowhere is a block that is missed.
func (b *Bitmap) mustHave(i int64) {
	if i < 0 || i >= b.blocks {
		panic(fmt.Sprintf("block %d of a bitmap of %d", i, b.blocks))
	}
}

// mutable returns a chunk to mark something in, or nil if all of it is marked.
func (b *Bitmap) mutable(i int64) *chunk {
	switch b.chunks[i] {
	case full:
		return nil
	case nil:
		b.chunks[i] = new(chunk)
	}
	return b.chunks[i]
}

// Set marks block i.
func (b *Bitmap) Set(i int64) {
	b.mustHave(i)
	if c := b.mutable(i / chunkBlocks); c != nil {
		c[i%chunkBlocks/64] |= 1 << (i % 64)
	}
}

// Get reports whether block i is marked.
func (b *Bitmap) Get(i int64) bool {
	b.mustHave(i)
	c := b.chunks[i/chunkBlocks]
	return c != nil && c[i%chunkBlocks/64]>>(i%64)&1 == 1
}

// SetRange marks the blocks from first to last, both included.
func (b *Bitmap) SetRange(first, last int64) {
	if first > last {
		return
	}
	b.mustHave(first)
	b.mustHave(last)
	for first <= last {
		i := first / chunkBlocks
		end := min(last, i*chunkBlocks+chunkBlocks-1)
		if end-first == chunkBlocks-1 {
			b.chunks[i] = full
		} else if c := b.mutable(i); c != nil {
			c.set(first%chunkBlocks, end%chunkBlocks)
		}
		first = end + 1
	}
}

func (c *chunk) set(first, last int64) {
	fw, lw := first/64, last/64
	head, tail := ^uint64(0)<<(first%64), ^uint64(0)>>(63-last%64)
	if fw == lw {
		c[fw] |= head & tail
		return
	}
	c[fw] |= head
	for w := fw + 1; w < lw; w++ {
		c[w] = ^uint64(0)
	}
	c[lw] |= tail
}

// Or adds every block marked in other, which must cover as many blocks.
func (b *Bitmap) Or(other *Bitmap) error {
	if other.blocks != b.blocks {
		return fmt.Errorf("unite bitmaps of %d and %d blocks: the device changed its size", b.blocks, other.blocks)
	}
	b.or(other)
	return nil
}

// or adds what is marked in other, which covers no more blocks.
func (b *Bitmap) or(other *Bitmap) {
	for i, from := range other.chunks {
		switch {
		case from == nil:
		case from == full:
			b.chunks[i] = full
		default:
			if to := b.mutable(int64(i)); to != nil {
				for k, w := range from {
					to[k] |= w
				}
			}
		}
	}
}

// Equal reports whether both cover as many blocks and mark the same of them.
func (b *Bitmap) Equal(other *Bitmap) bool {
	if b.blocks != other.blocks {
		return false
	}
	for i, c := range b.chunks {
		x, y := c, other.chunks[i]
		if x == nil {
			x = &empty
		}
		if y == nil {
			y = &empty
		}
		if x != y && *x != *y {
			return false
		}
	}
	return true
}

var empty chunk

// Count is the number of marked blocks.
func (b *Bitmap) Count() (n int64) {
	for _, c := range b.chunks {
		switch c {
		case nil:
		case full:
			n += chunkBlocks
		default:
			for _, w := range c {
				n += int64(bits.OnesCount64(w))
			}
		}
	}
	return n
}

// Clone returns an independent copy.
func (b *Bitmap) Clone() *Bitmap { return b.Grown(b.blocks) }

// Grown returns an independent copy that covers at least as many blocks as this one; those
// that came to it are clean.
func (b *Bitmap) Grown(blocks int64) *Bitmap {
	c := NewBitmap(blocks)
	c.or(b)
	return c
}

// Runs is the number of stretches of marked blocks.
func (b *Bitmap) Runs() (n int64) {
	for i := b.NextSet(0); i < b.Blocks(); i = b.NextSet(b.NextClear(i)) {
		n++
	}
	return n
}

// NextSet is the first marked block at or after i, or Blocks if there is none.
func (b *Bitmap) NextSet(i int64) int64 { return b.next(i, nil, 0) }

// NextClear is the first clean block at or after i, or Blocks if there is none.
func (b *Bitmap) NextClear(i int64) int64 { return b.next(i, full, ^uint64(0)) }

// next finds a set bit, of words in which flip is turned over; there is none in the chunk none.
func (b *Bitmap) next(i int64, none *chunk, flip uint64) int64 {
	for i < b.blocks {
		at := i / chunkBlocks
		c := b.chunks[at]
		if c != none {
			if c == nil {
				return i // the clean chunk of a search for what is clean
			}
			if k := c.next(i%chunkBlocks, flip); k < chunkBlocks {
				return min(at*chunkBlocks+k, b.blocks)
			}
		}
		i = (at + 1) * chunkBlocks
	}
	return b.blocks
}

func (c *chunk) next(i int64, flip uint64) int64 {
	w := i / 64
	word := (c[w] ^ flip) >> (i % 64) << (i % 64)
	for word == 0 {
		if w++; w == chunkWords {
			return chunkBlocks
		}
		word = c[w] ^ flip
	}
	return w*64 + int64(bits.TrailingZeros64(word))
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
