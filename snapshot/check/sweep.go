// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"fmt"
	"slices"
	"sort"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
)

// sweep goes through the layers of a device, newest first, and finds out range
// by range whether its bytes can be had. It goes on where a layer is damaged,
// which a merger cannot.
type sweep struct {
	*checker
	finding *Finding
	open    []kernel.Extent // what no newer layer has, in device order
	lost    []kernel.Extent
}

func (s *sweep) lose(e kernel.Extent, why error) {
	if e.Length <= 0 {
		return
	}
	s.finding.because(why)
	if n := len(s.lost); n > 0 && s.lost[n-1].End() == e.Offset {
		s.lost[n-1].Length += e.Length
		return
	}
	s.lost = append(s.lost, e)
}

// layer takes out of what is open what a layer has.
func (s *sweep) layer(ctx context.Context, l *shape) error {
	if l.err != nil && len(l.parts) == 0 {
		// What it had is not known: it may have been anything.
		for _, e := range s.open {
			s.lose(e, l.err)
		}
		s.open = nil
		return nil
	}
	for i, p := range l.parts {
		next := s.finding.Size
		if i+1 < len(l.parts) {
			next = l.parts[i+1].start
		}
		why, f := p.err, files{}
		if why == nil {
			var err error
			f, err = open(ctx, s.from, p.tree, p.start)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			why = err
		}
		if why == nil && l.err != nil {
			why = l.err
		}
		if why != nil {
			// It had some of what lies up to the next part.
			why = fmt.Errorf("part %s: %w", p.tree.Str(), why)
			s.take([]blockindex.Extent{{Offset: p.start, Length: next - p.start}}, func(e kernel.Extent, _ blockindex.Extent) { s.lose(e, why) })
			continue
		}
		layout := spans(s.from, f, s.Blob)
		s.take(f.index.Extents, func(e kernel.Extent, x blockindex.Extent) {
			if !x.Zero {
				s.data(e, x.Data+e.Offset-x.Offset, layout)
			}
		})
	}
	return nil
}

// data finds what cannot be had of a range whose bytes begin at data in a file.
func (s *sweep) data(e kernel.Extent, data int64, layout []span) {
	i := sort.Search(len(layout), func(i int) bool { return layout[i].end > data })
	for e.Length > 0 {
		n, bad := e.Length, error(nil)
		if i < len(layout) {
			n, bad = min(n, layout[i].end-data), layout[i].bad
		} else {
			bad = damaged("its data end at %d", data)
		}
		if bad != nil {
			s.lose(kernel.Extent{Offset: e.Offset, Length: n}, bad)
		}
		e.Offset, e.Length, data = e.Offset+n, e.Length-n, data+n
		i++
	}
}

// take cuts extents, in device order, out of what is open and calls fn with each
// range that was.
func (s *sweep) take(extents []blockindex.Extent, fn func(kernel.Extent, blockindex.Extent)) {
	if len(extents) == 0 || len(s.open) == 0 {
		return
	}
	first := extents[0].Offset
	last := extents[len(extents)-1].End()
	from := sort.Search(len(s.open), func(i int) bool { return s.open[i].End() > first })
	to := sort.Search(len(s.open), func(i int) bool { return s.open[i].Offset >= last })
	if from >= to {
		return
	}
	var rest []kernel.Extent
	i := 0
	for _, o := range s.open[from:to] {
		for o.Length > 0 {
			for i < len(extents) && extents[i].End() <= o.Offset {
				i++
			}
			if i == len(extents) || extents[i].Offset >= o.End() {
				rest = append(rest, o)
				break
			}
			x := extents[i]
			if gap := x.Offset - o.Offset; gap > 0 {
				rest = append(rest, kernel.Extent{Offset: o.Offset, Length: gap})
				o.Offset, o.Length = x.Offset, o.Length-gap
			}
			n := min(o.End(), x.End()) - o.Offset
			fn(kernel.Extent{Offset: o.Offset, Length: n}, x)
			o.Offset, o.Length = o.Offset+n, o.Length-n
		}
	}
	s.open = slices.Replace(s.open, from, to, rest...)
}
