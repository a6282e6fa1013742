// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"fmt"
	"slices"
)

// BlockSize is the unit of tracking, in bytes: one bit stands for one block.
const BlockSize = 4096

// Extent is a range of a device, in bytes.
type Extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// End is the first byte behind the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }

// Validate reports an extent that is empty, negative, or not inside a device
// of size bytes.
func (e Extent) Validate(size int64) error {
	if e.Offset < 0 || e.Length <= 0 || e.Offset > size || e.Length > size-e.Offset {
		return fmt.Errorf("extent at %d of %d bytes: not inside a device of %d bytes", e.Offset, e.Length, size)
	}
	return nil
}

// Align widens every extent to whole blocks, cuts it at the device's size,
// sorts, and joins what touches or overlaps; an empty extent vanishes. The
// device's last block may be short. Offsets must not be negative. It works in
// place and returns the shortened slice.
func Align(extents []Extent, size int64) []Extent {
	for i, e := range extents {
		if e.Length <= 0 || e.Offset >= size {
			extents[i].Length = 0
			continue
		}
		start := e.Offset / BlockSize * BlockSize
		end := size
		if e.Length < size-e.Offset {
			end = min((e.End()+BlockSize-1)/BlockSize*BlockSize, size)
		}
		extents[i] = Extent{start, end - start}
	}
	slices.SortFunc(extents, func(a, b Extent) int {
		switch {
		case a.Offset < b.Offset:
			return -1
		case a.Offset > b.Offset:
			return 1
		}
		return 0
	})
	out := extents[:0]
	for _, e := range extents {
		if e.Length <= 0 {
			continue
		}
		if n := len(out); n > 0 && e.Offset <= out[n-1].End() {
			out[n-1].Length = max(out[n-1].End(), e.End()) - out[n-1].Offset
			continue
		}
		out = append(out, e)
	}
	return out
}

// TotalLength sums the lengths of extents, in bytes.
func TotalLength(extents []Extent) (n int64) {
	for _, e := range extents {
		n += e.Length
	}
	return n
}
