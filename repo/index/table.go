// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// Location is a place where a blob lies; lengths and offsets are in bytes.
type Location struct {
	Pack               pack.ID
	Offset             uint32
	Length             uint32 // as stored
	UncompressedLength uint32 // 0 if it is not compressed
}

// Table is an open table. It reads a page or two per lookup, if they are not among
// those that it keeps, and keeps 8 bytes in memory for each 85 blobs. It is safe for
// concurrent use.
type Table struct {
	r         io.ReaderAt
	header    header
	sources   []pack.ID
	dead      []bool   // by number of the source
	directory []uint64 // the prefix that each entry page begins with
	number    uint64   // of the table, in this process
}

// OpenTable reads the head of a table of size bytes. The error wraps
// [ErrDamaged] if the bytes are not a whole table.
func OpenTable(r io.ReaderAt, size int64) (*Table, error) {
	p := pages.Get().(*page)
	defer pages.Put(p)
	if size < pageSize {
		return nil, fmt.Errorf("read index table: %d bytes are too few: %w", size, ErrDamaged)
	}
	if err := readPage(r, 0, p); err != nil {
		return nil, err
	}
	h, err := parseTableHeader(p[:headerSize])
	if err != nil {
		return nil, err
	}
	if h.size() != size {
		return nil, fmt.Errorf("read index table: %d bytes instead of %d: %w", size, h.size(), ErrDamaged)
	}
	t := &Table{
		r: r, header: h, dead: make([]bool, h.sources), number: tableNumbers.Add(1),
		sources: make([]pack.ID, 0, h.sources), directory: make([]uint64, 0, h.entryPages()),
	}
	err = t.records(h.sourcePage(), h.sources, sourceSize, func(b []byte) error {
		t.sources = append(t.sources, pack.ID(b))
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = t.records(h.directoryPage(), h.entryPages(), prefixSize, func(b []byte) error {
		t.directory = append(t.directory, binary.LittleEndian.Uint64(b))
		return nil
	})
	if err == nil && !slices.IsSorted(t.directory) {
		err = fmt.Errorf("read index table: its directory is out of order: %w", ErrDamaged)
	}
	return t, err
}

// Sources are the index files that the table was made from and that are still
// listed.
func (t *Table) Sources() []pack.ID {
	live := make([]pack.ID, 0, len(t.sources))
	for i, id := range t.sources {
		if !t.dead[i] {
			live = append(live, id)
		}
	}
	return live
}

// Retain makes the table answer only from the index files for which listed is
// true, and says how many those are. It must not run at the same time as any
// other method.
func (t *Table) Retain(listed func(pack.ID) bool) (live int) {
	for i, id := range t.sources {
		if t.dead[i] = !listed(id); !t.dead[i] {
			live++
		}
	}
	return live
}

// Entries is how many places of blobs the table holds, those of index files
// that are no longer listed included.
func (t *Table) Entries() int64 { return t.header.entries }

// Find appends every place of the blob to dst. With any, one is enough.
func (t *Table) Find(dst []Location, h pack.Handle, any bool) ([]Location, error) {
	want := prefix(h.ID[:])
	for i := t.firstPage(h.ID); i < len(t.directory) && t.directory[i] <= want; i++ {
		p, err := t.page(t.header.entryPage() + int64(i))
		if err != nil {
			return dst, err
		}
		n := t.entriesIn(i)
		for j := lowerBound(p, n, h.ID); j < n; j++ {
			e := parseEntry(p[j*entrySize:])
			if e.blob.ID != h.ID {
				return dst, nil
			}
			if e.blob.Type != h.Type {
				continue
			}
			rec, err := t.pack(e.pack)
			if err != nil {
				return dst, err
			}
			if t.dead[rec.source] {
				continue
			}
			dst = append(dst, Location{rec.id, e.blob.Offset, e.blob.Length, e.blob.UncompressedLength})
			if any {
				return dst, nil
			}
		}
	}
	return dst, nil
}

// firstPage is the number of the first entry page that may hold the ID: the
// last one that begins below it.
func (t *Table) firstPage(id pack.ID) int {
	first, _ := slices.BinarySearch(t.directory, prefix(id[:]))
	return max(0, first-1)
}

// lowerBound is the number of the first of a page's n entries that is not
// below id.
func lowerBound(p *page, n int, id pack.ID) int {
	lo, hi := 0, n
	for lo < hi {
		mid := (lo + hi) / 2
		if pack.ID(p[mid*entrySize:mid*entrySize+32]).Compare(id) < 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

func (t *Table) entriesIn(page int) int {
	const per = payloadSize / entrySize
	return int(min(per, t.header.entries-int64(page)*per))
}

func (t *Table) pack(number uint32) (packRecord, error) {
	const per = payloadSize / packSize
	if int64(number) >= t.header.packs {
		return packRecord{}, fmt.Errorf("read index table: pack number %d of %d: %w", number, t.header.packs, ErrDamaged)
	}
	p, err := t.page(t.header.packPage() + int64(number/per))
	if err != nil {
		return packRecord{}, err
	}
	return t.parsePack(p[number%per*packSize:])
}

func (t *Table) parsePack(b []byte) (packRecord, error) {
	rec := packRecord{pack.ID(b[:32]), binary.LittleEndian.Uint32(b[32:])}
	if int64(rec.source) >= t.header.sources {
		return rec, fmt.Errorf("read index table: index file number %d of %d: %w", rec.source, t.header.sources, ErrDamaged)
	}
	return rec, nil
}

// records reads count records of size bytes from a section that begins at a
// page.
func (t *Table) records(firstPage, count int64, size int, fn func([]byte) error) error {
	p := pages.Get().(*page)
	defer pages.Put(p)
	per := int64(payloadSize / size)
	for i := int64(0); i < count; i++ {
		if i%per == 0 {
			if err := readPage(t.r, firstPage+i/per, p); err != nil {
				return err
			}
		}
		at := int(i%per) * size
		if err := fn(p[at : at+size]); err != nil {
			return err
		}
	}
	return nil
}

// Each calls fn for every place of every blob, in the order of their IDs.
func (t *Table) Each(fn func(pack.Handle, Location) error) error {
	packs, err := t.packRecords()
	if err != nil {
		return err
	}
	return t.records(t.header.entryPage(), t.header.entries, entrySize, func(b []byte) error {
		e := parseEntry(b)
		if int64(e.pack) >= t.header.packs {
			return fmt.Errorf("read index table: pack number %d of %d: %w", e.pack, t.header.packs, ErrDamaged)
		}
		if rec := packs[e.pack]; !t.dead[rec.source] {
			return fn(e.blob.Handle, Location{rec.id, e.blob.Offset, e.blob.Length, e.blob.UncompressedLength})
		}
		return nil
	})
}

func (t *Table) packRecords() ([]packRecord, error) {
	packs := make([]packRecord, 0, t.header.packs)
	err := t.records(t.header.packPage(), t.header.packs, packSize, func(b []byte) error {
		rec, err := t.parsePack(b)
		packs = append(packs, rec)
		return err
	})
	return packs, err
}
