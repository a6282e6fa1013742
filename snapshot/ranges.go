// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// ParseRanges reads a list of changed ranges, one JSON object
// {"offset":…,"length":…} a line, of a device of size bytes. Offsets and
// lengths are in bytes and need not be whole blocks. A list with one bad line
// is refused as a whole: what it meant to say cannot be known.
func ParseRanges(rd io.Reader, size int64) ([]kernel.Extent, error) {
	var out []kernel.Extent
	lines := bufio.NewScanner(rd)
	for n := 1; lines.Scan(); n++ {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		var raw struct {
			Offset *int64 `json:"offset"`
			Length *int64 `json:"length"`
		}
		err := json.Unmarshal(line, &raw)
		if wrongType := (*json.UnmarshalTypeError)(nil); err != nil && !errors.As(err, &wrongType) {
			return nil, fmt.Errorf("read changed ranges: line %d: %w", n, err)
		}
		if err != nil || raw.Offset == nil || raw.Length == nil {
			return nil, fmt.Errorf(`read changed ranges: line %d: want {"offset":BYTES,"length":BYTES}`, n)
		}
		e := kernel.Extent{Offset: *raw.Offset, Length: *raw.Length}
		if e.Length == 0 && e.Offset >= 0 && e.Offset <= size {
			continue
		}
		if err := e.Validate(size); err != nil {
			return nil, fmt.Errorf("read changed ranges: line %d: %w", n, err)
		}
		out = append(out, e)
	}
	if err := lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = errors.New("a line is too long")
		}
		return nil, fmt.Errorf("read changed ranges: %w", err)
	}
	return kernel.Align(out, size), nil
}

// bitmapRanges walks the marked blocks of a bitmap without listing them.
func bitmapRanges(b *kernel.Bitmap, size int64) iter.Seq[kernel.Extent] {
	return func(yield func(kernel.Extent) bool) {
		for i := b.NextSet(0); i < b.Blocks(); {
			j := b.NextClear(i)
			start, end := i*kernel.BlockSize, min(j*kernel.BlockSize, size)
			if start >= end || !yield(kernel.Extent{Offset: start, Length: end - start}) {
				return
			}
			i = b.NextSet(j)
		}
	}
}

// withHoles cuts dirty ranges into what lies in the data extents, which is to
// be read, and what does not and so is a hole. Both are sorted and made of
// whole blocks.
func withHoles(dirty iter.Seq[kernel.Extent], data []kernel.Extent) iter.Seq[layer.Range] {
	return func(yield func(layer.Range) bool) {
		i := 0
		for e := range dirty {
			for e.Length > 0 {
				for i < len(data) && data[i].End() <= e.Offset {
					i++
				}
				n, hole := e.Length, true
				if i < len(data) {
					if data[i].Offset <= e.Offset {
						n, hole = min(n, data[i].End()-e.Offset), false
					} else {
						n = min(n, data[i].Offset-e.Offset)
					}
				}
				if !yield(layer.Range{Extent: kernel.Extent{Offset: e.Offset, Length: n}, Hole: hole}) {
					return
				}
				e.Offset, e.Length = e.Offset+n, e.Length-n
			}
		}
	}
}

// toRead treats every range as one to be read.
func toRead(dirty iter.Seq[kernel.Extent]) iter.Seq[layer.Range] {
	return func(yield func(layer.Range) bool) {
		for e := range dirty {
			if !yield(layer.Range{Extent: e}) {
				return
			}
		}
	}
}
