// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"io"
	"sort"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
)

// Piece is a range of the merged device that one extent of one layer gives.
type Piece struct {
	Offset, Length int64

	// Missing ranges are in no layer: the snapshot is not complete there. Lost is
	// set if a layer may have had them that cannot be read, and says why not.
	Missing bool
	Lost    error
	Zero    bool

	// Of the others, Data is the offset in Part's data file, and Sum the
	// number of the first block's sum.
	Part *Part
	Data int64
	Sum  int64

	cursor *cursor
}

// End is the first byte behind the piece.
func (p Piece) End() int64 { return p.Offset + p.Length }

// Merger walks the device's content as its layers give it together, in device
// order. It holds one part of each layer.
type Merger struct {
	from    Loader
	cursors []*cursor // newest first
	size    int64
	pos     int64
}

// NewMerger merges layers, oldest first as Open returns them, for a device of
// size bytes.
func NewMerger(from Loader, layers []*Layer, size int64) *Merger {
	m := &Merger{from: from, size: size}
	for i := len(layers) - 1; i >= 0; i-- {
		m.cursors = append(m.cursors, &cursor{layer: layers[i], at: -1})
	}
	return m
}

// Next is the next piece; io.EOF at the device's end. The pieces follow one
// another without gaps.
func (m *Merger) Next(ctx context.Context) (Piece, error) {
	if m.pos >= m.size {
		return Piece{}, io.EOF
	}
	limit := m.size
	for _, c := range m.cursors {
		e, err := c.seek(ctx, m.from, m.pos)
		if err != nil {
			return Piece{}, err
		}
		if e.Offset > m.pos {
			limit = min(limit, e.Offset)
			continue
		}
		p := Piece{Offset: m.pos, Length: min(limit, e.End()) - m.pos, Zero: e.Zero, Part: c.part, cursor: c}
		if c.lost != nil {
			p.Missing, p.Lost = true, c.lost
		} else if !e.Zero {
			skip := m.pos - e.Offset
			p.Data, p.Sum = e.Data+skip, c.sum+skip/kernel.BlockSize
		}
		m.pos = p.End()
		return p, nil
	}
	p := Piece{Offset: m.pos, Length: limit - m.pos, Missing: true}
	m.pos = limit
	return p, nil
}

// cursor walks one layer.
type cursor struct {
	layer *Layer
	at    int // index of part in layer.parts; -1 before the first
	part  *Part
	ext   int   // in the part
	sum   int64 // blocks with data in the extents before ext

	lost error             // why the part, or the layer, cannot be read
	gap  blockindex.Extent // what it may have had then

	sums     []byte // a blob of the part's sums file, and where it starts
	sumsPart *Part
	sumsFrom int64
	sumsErr  error // why that blob cannot be had; then sumsEnd is its end
	sumsEnd  int64
}

// end stands for the extent behind the last one.
var end = blockindex.Extent{Offset: 1<<63 - 1}

// seek is the first extent that ends behind pos, or a range at the start of a
// part that need not be opened yet. pos never decreases.
func (c *cursor) seek(ctx context.Context, from Loader, pos int64) (blockindex.Extent, error) {
	for {
		if c.lost == nil && c.layer.lost != nil {
			c.lost, c.gap = c.layer.lost, blockindex.Extent{Length: end.Offset}
		}
		if c.lost != nil && c.gap.End() > pos {
			return c.gap, nil
		}
		if c.lost = nil; c.part != nil {
			for x := c.part.Index.Extents; c.ext < len(x); c.ext++ {
				e := x[c.ext]
				if e.End() > pos {
					return e, nil
				}
				if !e.Zero {
					c.sum += e.Blocks()
				}
			}
		}
		// The last part that starts at or before pos, if that is further on;
		// else the one that follows.
		parts := c.layer.parts
		next := max(c.at+1, sort.Search(len(parts), func(i int) bool { return parts[i].start > pos })-1)
		if next >= len(parts) {
			return end, nil
		}
		if parts[next].start > pos {
			return blockindex.Extent{Offset: parts[next].start}, nil
		}
		p, err := openDamagedPart(ctx, from, parts[next], c.layer.damaged != nil)
		if err != nil && (c.layer.damaged == nil || !c.layer.damaged(err)) {
			return end, err
		}
		c.at, c.part, c.ext, c.sum = next, p, 0, 0
		if err != nil {
			// It had some of what lies up to the next part.
			c.lost, c.gap = err, blockindex.Extent{Offset: parts[next].start, Length: end.Offset - parts[next].start}
			if next+1 < len(parts) {
				c.gap.Length = parts[next+1].start - parts[next].start
			}
		}
	}
}
