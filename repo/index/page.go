// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
)

// A table is a sequence of pages of one size, each with a checksum of its own
// that also covers its number, so that a page which is stale, torn or in the
// wrong place is noticed when it is read.
const (
	pageSize    = 4096
	payloadSize = pageSize - 4
)

type page [pageSize]byte

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	pages      = sync.Pool{New: func() any { return new(page) }}
)

func (p *page) sum(number int64) uint32 {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(number))
	return crc32.Update(crc32.Checksum(n[:], castagnoli), castagnoli, p[:payloadSize])
}

func (p *page) seal(number int64) {
	binary.LittleEndian.PutUint32(p[payloadSize:], p.sum(number))
}

func readPage(r io.ReaderAt, number int64, p *page) error {
	if n, err := r.ReadAt(p[:], number*pageSize); n < pageSize {
		return fmt.Errorf("read page %d of an index table: %w: %w", number, ErrDamaged, err)
	}
	if binary.LittleEndian.Uint32(p[payloadSize:]) != p.sum(number) {
		return fmt.Errorf("read page %d of an index table: wrong checksum: %w", number, ErrDamaged)
	}
	return nil
}

// pagesFor is how many pages hold n records of size bytes; a record never
// crosses a page.
func pagesFor(n int64, size int) int64 {
	per := int64(payloadSize / size)
	return (n + per - 1) / per
}

// recordWriter lays records of one size into pages.
type recordWriter struct {
	w      io.Writer
	number int64 // of the page being filled
	page   page
	used   int
}

// next returns room for a record of size bytes, having written out the page
// before if it was full.
func (w *recordWriter) next(size int) ([]byte, error) {
	if w.used+size > payloadSize {
		if err := w.flush(); err != nil {
			return nil, err
		}
	}
	w.used += size
	return w.page[w.used-size : w.used], nil
}

// flush writes out the page if it holds anything; a new section begins on a
// page of its own.
func (w *recordWriter) flush() error {
	if w.used == 0 {
		return nil
	}
	w.page.seal(w.number)
	if _, err := w.w.Write(w.page[:]); err != nil {
		return fmt.Errorf("write index table: %w", err)
	}
	w.number++
	w.page, w.used = page{}, 0
	return nil
}
