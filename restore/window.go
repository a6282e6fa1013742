// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// limits bound a window, and so the memory for its plan and for the blocks
// that two blobs share.
type limits struct {
	segments int   // and runs of zeros
	seams    int   // borders of blobs inside of a block, 4 KiB each at worst
	bytes    int64 // of data
	hold     int   // bytes of scattered blobs, to be written along with others
}

// restoreLimits let a window be as large as memory allows: a blob whose blocks
// lie scattered in it is fetched once. Its data are never held as a whole, so
// that they need no limit.
func restoreLimits() limits {
	return limits{segments: 1 << 17, seams: 1 << 13, bytes: 1 << 62, hold: 24 << 20}
}

// dumpLimits keep the data of a window in memory, to be put in order.
func dumpLimits() limits { return limits{segments: 1 << 16, seams: 1 << 16, bytes: 16 << 20} }

// need is a blob and what it is needed for, in device order.
type need struct {
	id   repo.ID
	segs []segment
}

// run is a stretch of a window: zeros, or data.
type run struct {
	kernel.Extent
	zero bool
}

// window is a stretch of the plan, in device order. It begins and ends at
// whole blocks.
type window struct {
	needs []need
	byID  map[repo.ID]int // in needs
	runs  []run
	bytes int64 // of data

	segs, seams int
}

// builder cuts pieces into windows.
type builder struct {
	lim  limits
	size int64 // of the device
	w    *window
	emit func(*window) error
	// missing, if set, is told of what no layer has, which is else an error.
	missing func(kernel.Extent, error)
	gaps    bool // put zeros where nothing is known
}

// add adds the next piece, which begins at a whole block.
func (b *builder) add(p layer.Piece) error {
	if p.Missing && b.missing == nil { // a check has excluded that
		return &DamageError{[]kernel.Extent{{Offset: p.Offset, Length: p.Length}}, whyMissing(p)}
	}
	if p.Missing {
		b.missing(kernel.Extent{Offset: p.Offset, Length: p.Length}, whyMissing(p))
		if !b.gaps {
			return nil
		}
		p.Zero = true
	}
	if p.Zero {
		b.run(run{kernel.Extent{Offset: p.Offset, Length: p.Length}, true})
		if b.w.segs++; b.w.segs >= b.lim.segments {
			return b.flush()
		}
		return nil
	}
	return segments(p, b.segment)
}

// segment takes a segment, and ends the window inside of it if it is due: the
// ends of segments need not be ends of blocks.
func (b *builder) segment(id repo.ID, s segment) error {
	for s.length > 0 {
		now, end := s, false
		if b.due(s) {
			if border := b.border(s); border > s.off {
				now.length, end = border-s.off, true
			}
		}
		b.put(id, now)
		if end {
			if err := b.flush(); err != nil {
				return err
			}
		}
		s.off, s.in, s.length = s.off+now.length, s.in+now.length, s.length-now.length
	}
	return nil
}

// due reports whether the window is full with this segment.
func (b *builder) due(s segment) bool {
	w := b.open()
	seams := w.seams
	if !b.whole(s.off + s.length) {
		seams++
	}
	return w.segs+1 >= b.lim.segments || seams >= b.lim.seams || w.bytes+s.length >= b.lim.bytes
}

// border is the last end of a block in the segment that the limit of bytes
// lets in; it may lie before the segment.
func (b *builder) border(s segment) int64 {
	end := min(s.off+s.length, s.off+max(b.lim.bytes-b.w.bytes, kernel.BlockSize))
	if end == b.size {
		return end
	}
	return end / kernel.BlockSize * kernel.BlockSize
}

func (b *builder) whole(off int64) bool { return off%kernel.BlockSize == 0 || off == b.size }

func (b *builder) open() *window {
	if b.w == nil {
		b.w = &window{byID: map[repo.ID]int{}}
	}
	return b.w
}

// run notes a stretch, joined with the one before it.
func (b *builder) run(r run) {
	w := b.open()
	if n := len(w.runs); n > 0 {
		if last := &w.runs[n-1]; last.End() == r.Offset && last.zero == r.zero {
			last.Length += r.Length
			return
		}
	}
	w.runs = append(w.runs, r)
}

func (b *builder) put(id repo.ID, s segment) {
	b.run(run{s.extent(), false})
	w := b.w
	s.at = w.bytes
	w.bytes += s.length
	if !b.whole(s.off + s.length) {
		w.seams++
	}
	i, known := w.byID[id]
	if !known {
		i = len(w.needs)
		w.byID[id] = i
		w.needs = append(w.needs, need{id: id})
	}
	n := &w.needs[i]
	if k := len(n.segs); k > 0 {
		if last := &n.segs[k-1]; last.off+last.length == s.off && last.in+last.length == s.in {
			last.length += s.length
			return
		}
	}
	n.segs = append(n.segs, s)
	w.segs++
}

// flush hands out the window, if there is one.
func (b *builder) flush() error {
	w := b.w
	b.w = nil
	if w == nil {
		return nil
	}
	return b.emit(w)
}

// selector picks ranges out of a merger, in device order.
type selector struct {
	next  func() (layer.Piece, error)
	piece layer.Piece
}

// each calls fn with the pieces of a range that begins at or behind the end of
// the range before it.
func (s *selector) each(e kernel.Extent, fn func(layer.Piece) error) error {
	for e.Length > 0 {
		for s.piece.End() <= e.Offset {
			var err error
			if s.piece, err = s.next(); err != nil {
				return err
			}
		}
		p := s.piece
		skip := e.Offset - p.Offset
		p.Offset, p.Length = e.Offset, min(e.Length, p.Length-skip)
		if !p.Zero {
			p.Data += skip
		}
		if err := fn(p); err != nil {
			return err
		}
		e.Offset, e.Length = p.End(), e.Length-p.Length
	}
	return nil
}
