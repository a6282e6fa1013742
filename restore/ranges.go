// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"fmt"
	"strings"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

const (
	shownRanges = 8       // in an error's text
	keptRanges  = 1 << 16 // in a rangeSet
)

// rangeSet collects ranges of a device of size bytes in any order, widened to
// whole blocks and joined. What is more than keptRanges pieces is joined
// across gaps, so that it says too much rather than too little.
type rangeSet struct {
	size    int64
	extents []kernel.Extent
}

func (s *rangeSet) add(e kernel.Extent) {
	if n := len(s.extents); n > 0 && s.extents[n-1].End() == e.Offset {
		s.extents[n-1].Length += e.Length
		return
	}
	s.extents = append(s.extents, e)
	if len(s.extents) < 2*keptRanges {
		return
	}
	if s.list(); len(s.extents) > keptRanges {
		joined := s.extents[:0]
		for i := 0; i < len(s.extents); i += 2 {
			last := s.extents[min(i+1, len(s.extents)-1)]
			joined = append(joined, kernel.Extent{Offset: s.extents[i].Offset, Length: last.End() - s.extents[i].Offset})
		}
		s.extents = joined
	}
}

// list is the ranges in device order.
func (s *rangeSet) list() []kernel.Extent {
	s.extents = kernel.Align(s.extents, s.size)
	return s.extents
}

// describe names ranges in one line.
func describe(extents []kernel.Extent) string {
	var b strings.Builder
	b.WriteString("bytes ")
	for i, e := range extents[:min(len(extents), shownRanges)] {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%d to %d", e.Offset, e.End()-1)
	}
	if n := len(extents) - shownRanges; n > 0 {
		fmt.Fprintf(&b, " and %d more ranges", n)
	}
	if len(extents) > 1 {
		fmt.Fprintf(&b, " (%d bytes in all)", kernel.TotalLength(extents))
	}
	return b.String()
}

// DamageError says which ranges of a snapshot's device the repository cannot
// give. It is a [layer.ErrDamaged].
type DamageError struct {
	Ranges []kernel.Extent // in device order, in whole blocks
	Cause  error           // why, of the first one found
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("%v: it cannot give %s: %v", layer.ErrDamaged, describe(e.Ranges), e.Cause)
}

// Unwrap gives the sentinel and the cause.
func (e *DamageError) Unwrap() []error { return []error{layer.ErrDamaged, e.Cause} }

// DifferError says where a restored target does not hold what the snapshot
// does, when it is read back.
type DifferError struct {
	Target string
	Ranges []kernel.Extent // in device order, in whole blocks
}

func (e *DifferError) Error() string {
	return fmt.Sprintf("verify %s: it was written and reads back otherwise: %s differ", e.Target, describe(e.Ranges))
}
