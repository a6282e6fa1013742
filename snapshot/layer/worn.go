// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// WornOptions say what is looked for.
type WornOptions struct {
	Size   int64 // of the device, in bytes
	Budget int64 // bytes of the device that are wanted at most
	// Percent is what may be live, at most, of a blob that is worn.
	Percent int64
	// Settled is how many of the layers, from the oldest on, hold what has settled. Worn
	// blobs of the others come first: theirs are needed by snapshots that go soon.
	Settled int
}

// Worn lists the ranges of the device, sorted and in whole blocks, whose data
// lie in blobs of which little is live any more: of those with the least live, and of what
// has settled last, as much as the budget allows. With these ranges stored anew, the layers
// need less of such blobs, or nothing at all.
//
// What is live is what the layers give together. They are to be the newest of
// a chain: then nothing overrides what they give. It reads their indexes and
// nothing else, and holds one part of each, and the ranges of what it found
// within a few times the budget.
func Worn(ctx context.Context, from Loader, layers []*Layer, o WornOptions) ([]kernel.Extent, error) {
	w := &wear{WornOptions: o, settled: layers[:o.Settled], open: map[*cursor]*partWear{}}
	m := NewMerger(from, layers, o.Size)
	for {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		p, err := m.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		w.add(p)
	}
	for _, p := range w.open {
		w.settle(p)
	}
	return w.choose(), nil
}

// wear is one run of Worn.
type wear struct {
	WornOptions
	settled []*Layer
	open    map[*cursor]*partWear
	zeros   int64 // length of the zeros that end where the walk is
	found   []wornBlob
	held    int64 // bytes of what was found
}

// partWear is how worn the blobs of one part are.
type partWear struct {
	part    *Part
	settled bool    // it is of what has settled
	live    []int64 // of each blob, in bytes
	pieces  []wornPiece

	end, data int64 // where the last piece ended, on the device and in the data file
}

// wornPiece is a range of the device and the blob that gives it.
type wornPiece struct {
	kernel.Extent
	blob int
}

// wornBlob is a blob of which little is live, and where.
type wornBlob struct {
	live    float64 // the part of it that is
	settled bool    // its layer is one of what has settled
	bytes   int64   // in the ranges
	ranges  []kernel.Extent
}

// add counts a piece of the merged device.
func (w *wear) add(p Piece) {
	if p.Zero {
		w.zeros += p.Length
		return
	}
	zeros := w.zeros
	w.zeros = 0
	if p.Missing {
		return
	}
	part := w.open[p.cursor]
	if part == nil || part.part != p.Part {
		if part != nil {
			w.settle(part)
		}
		part = &partWear{part: p.Part, settled: slices.Contains(w.settled, p.cursor.layer), live: make([]int64, len(p.Part.Data.Blobs))}
		w.open[p.cursor] = part
	}
	// Zeros inside of a run are in its chunks, and no extent points at them
	// (docs/format.md): they were not overwritten.
	if gap := p.Offset - part.end; gap > 0 && gap <= zeros && p.Data-part.data == gap {
		part.cover(part.data, gap)
	}
	part.end, part.data = p.End(), p.Data+p.Length
	for n := int64(0); n < p.Length; {
		blob, _, left := p.Part.Data.Locate(p.Data + n)
		left = min(left, p.Length-n)
		part.live[blob] += left
		// A block that two blobs give is needed of both. The device's last one
		// may be short, and stays where it is.
		start, end := p.Offset+n, p.Offset+n+left
		start -= start % kernel.BlockSize
		end = min(kernel.BlocksOf(end)*kernel.BlockSize, p.End()/kernel.BlockSize*kernel.BlockSize)
		if start < end {
			part.pieces = append(part.pieces, wornPiece{kernel.Extent{Offset: start, Length: end - start}, blob})
		}
		n += left
	}
}

// cover counts bytes of the data file as live.
func (p *partWear) cover(off, length int64) {
	for length > 0 {
		blob, _, left := p.part.Data.Locate(off)
		left = min(left, length)
		p.live[blob] += left
		off, length = off+left, length-left
	}
}

// settle finds the worn blobs of a part that the walk has left.
func (w *wear) settle(p *partWear) {
	found := map[int]*wornBlob{}
	for _, x := range p.pieces {
		size := p.part.Data.size(x.blob)
		if p.live[x.blob]*100 > size*w.Percent {
			continue
		}
		b := found[x.blob]
		if b == nil {
			b = &wornBlob{settled: p.settled, live: float64(p.live[x.blob]) / float64(size)}
			found[x.blob] = b
		}
		b.bytes += x.Length
		b.ranges = append(b.ranges, x.Extent)
	}
	for _, b := range found {
		w.found = append(w.found, *b)
		w.held += b.bytes
	}
	if w.held > 4*w.Budget {
		w.trim()
	}
}

// trim keeps the blobs that come first, as far as the budget goes.
func (w *wear) trim() {
	rank := func(b wornBlob) int {
		if b.settled {
			return 1
		}
		return 0
	}
	slices.SortFunc(w.found, func(a, b wornBlob) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.live, b.live), cmp.Compare(a.ranges[0].Offset, b.ranges[0].Offset))
	})
	w.held = 0
	for i, b := range w.found {
		if w.held >= w.Budget {
			clear(w.found[i:])
			w.found = w.found[:i]
			return
		}
		w.held += b.bytes
	}
}

// choose lists what the budget is spent on.
func (w *wear) choose() (out []kernel.Extent) {
	w.trim()
	left := w.Budget / kernel.BlockSize * kernel.BlockSize
	for _, b := range w.found {
		for _, e := range b.ranges {
			if e.Length = min(e.Length, left); e.Length > 0 {
				out = append(out, e)
				left -= e.Length
			}
		}
	}
	return kernel.Align(out, w.Size)
}
