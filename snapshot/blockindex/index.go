// SPDX-License-Identifier: BSD-2-Clause

// Package blockindex is the binary format of a block index: which ranges of a
// device a part of a layer describes, and where in the part's data file their
// bytes lie. docs/format.md has its byte table.
//
// It promises that Decode(Encode(x)) is x, and that Decode accepts only what
// [Index.Validate] accepts, whatever bytes it is given. It knows nothing of
// repositories and devices.
package blockindex

import (
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// ErrDamaged is wrapped by every error about bytes that are no block index.
var ErrDamaged = errors.New("block index is damaged")

// Extent is a described range of the device: Length bytes at Offset, whose
// content is either zeros or the bytes of the data file from Data on.
type Extent struct {
	Offset int64
	Length int64
	Data   int64 // meaningless, and 0, where Zero is set
	Zero   bool
}

// End is the first byte behind the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }

// Blocks is the number of blocks in the extent; the last may be short.
func (e Extent) Blocks() int64 { return kernel.BlocksOf(e.Length) }

// Index describes one part: a contiguous range [Start, End) of the device,
// within which the extents are sorted and do not overlap. What no extent
// describes is a matter of older layers.
type Index struct {
	Start      int64
	End        int64 // a multiple of the block size, or the device's size
	DataLength int64 // of the data file, in bytes
	Extents    []Extent
}

// DataBlocks is the number of blocks that have data: as many as the part has
// sums.
func (x *Index) DataBlocks() (n int64) {
	for _, e := range x.Extents {
		if !e.Zero {
			n += e.Blocks()
		}
	}
	return n
}

// Validate reports the first thing that makes the index unusable.
func (x *Index) Validate() error {
	switch {
	case x.Start < 0 || x.Start%kernel.BlockSize != 0:
		return fmt.Errorf("%w: part starts at %d, not at a block", ErrDamaged, x.Start)
	case x.End < x.Start:
		return fmt.Errorf("%w: part ends at %d, before its start at %d", ErrDamaged, x.End, x.Start)
	case x.DataLength < 0:
		return fmt.Errorf("%w: data length %d", ErrDamaged, x.DataLength)
	}
	pos := x.Start
	for _, e := range x.Extents {
		if err := x.validateExtent(e, pos); err != nil {
			return err
		}
		pos = e.End()
	}
	return nil
}

func (x *Index) validateExtent(e Extent, pos int64) error {
	switch {
	case e.Offset < pos || e.Length <= 0 || e.Offset > x.End || e.Length > x.End-e.Offset:
		return fmt.Errorf("%w: extent at %d of %d bytes overlaps its neighbour or leaves its part", ErrDamaged, e.Offset, e.Length)
	case e.Offset%kernel.BlockSize != 0 || e.Length%kernel.BlockSize != 0 && e.End() != x.End:
		return fmt.Errorf("%w: extent at %d of %d bytes is not made of blocks", ErrDamaged, e.Offset, e.Length)
	case e.Zero && e.Data != 0:
		return fmt.Errorf("%w: extent of zeros at %d has data", ErrDamaged, e.Offset)
	case !e.Zero && (e.Data < 0 || e.Data > x.DataLength || e.Length > x.DataLength-e.Data):
		return fmt.Errorf("%w: extent at %d points at %d, outside of %d bytes of data", ErrDamaged, e.Offset, e.Data, x.DataLength)
	}
	return nil
}

// Append adds a range behind the last one and joins the two where they are
// one: neighbours on the device that are both zeros, or whose data are
// neighbours too.
func (x *Index) Append(e Extent) {
	if n := len(x.Extents); n > 0 {
		last := &x.Extents[n-1]
		if last.End() == e.Offset && last.Length%kernel.BlockSize == 0 && last.Zero == e.Zero &&
			(e.Zero || last.Data+last.Length == e.Data) {
			last.Length += e.Length
			return
		}
	}
	x.Extents = append(x.Extents, e)
}
