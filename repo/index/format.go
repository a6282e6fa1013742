// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

const (
	magic         = "dsyncIDX"
	formatVersion = 1
)

// Sizes of a table's records, in bytes.
const (
	headerSize = 40
	sourceSize = 32       // ID of an index file
	packSize   = 32 + 4   // pack ID, number of the index file that lists it
	entrySize  = 32 + 4*4 // blob ID, pack number and type, offset, length, plain length
	prefixSize = 8        // first bytes of the first blob ID of an entry page
	treeFlag   = uint32(1) << 31
	maxPacks   = math.MaxInt32
)

// header is a table's first page.
type header struct {
	sources, packs int64
	entries        int64
}

func (h header) put(b []byte) {
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], formatVersion)
	binary.LittleEndian.PutUint32(b[12:], pageSize)
	binary.LittleEndian.PutUint64(b[16:], uint64(h.sources))
	binary.LittleEndian.PutUint64(b[24:], uint64(h.packs))
	binary.LittleEndian.PutUint64(b[32:], uint64(h.entries))
}

func parseTableHeader(b []byte) (h header, err error) {
	if string(b[:8]) != magic {
		return h, fmt.Errorf("read index table: not an index table: %w", ErrDamaged)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != formatVersion || binary.LittleEndian.Uint32(b[12:]) != pageSize {
		return h, fmt.Errorf("read index table: version %d is not known: %w", v, ErrDamaged)
	}
	sources, packs, entries := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:]), binary.LittleEndian.Uint64(b[32:])
	// The bounds keep every product below in range.
	if sources > maxPacks || packs > maxPacks || entries > 1<<40 {
		return h, fmt.Errorf("read index table: impossible counts: %w", ErrDamaged)
	}
	return header{int64(sources), int64(packs), int64(entries)}, nil
}

// The sections follow each other in this order, each on pages of its own.
func (h header) sourcePage() int64    { return 1 }
func (h header) packPage() int64      { return h.sourcePage() + pagesFor(h.sources, sourceSize) }
func (h header) entryPage() int64     { return h.packPage() + pagesFor(h.packs, packSize) }
func (h header) directoryPage() int64 { return h.entryPage() + h.entryPages() }
func (h header) entryPages() int64    { return pagesFor(h.entries, entrySize) }
func (h header) size() int64 {
	return (h.directoryPage() + pagesFor(h.entryPages(), prefixSize)) * pageSize
}

// entry is one place of one blob.
type entry struct {
	blob pack.Blob
	pack uint32 // number of the pack in the table
}

// compare orders a table's entries: by ID first, since lookups go by it.
func (e entry) compare(o entry) int {
	return cmp.Or(e.blob.ID.Compare(o.blob.ID), cmp.Compare(e.blob.Type, o.blob.Type),
		cmp.Compare(e.pack, o.pack), cmp.Compare(e.blob.Offset, o.blob.Offset))
}

func (e entry) put(b []byte) {
	copy(b, e.blob.ID[:])
	p := e.pack
	if e.blob.Type == pack.TreeBlob {
		p |= treeFlag
	}
	binary.LittleEndian.PutUint32(b[32:], p)
	binary.LittleEndian.PutUint32(b[36:], e.blob.Offset)
	binary.LittleEndian.PutUint32(b[40:], e.blob.Length)
	binary.LittleEndian.PutUint32(b[44:], e.blob.UncompressedLength)
}

func parseEntry(b []byte) (e entry) {
	copy(e.blob.ID[:], b)
	p := binary.LittleEndian.Uint32(b[32:])
	e.pack, e.blob.Type = p&^treeFlag, pack.DataBlob
	if p&treeFlag != 0 {
		e.blob.Type = pack.TreeBlob
	}
	e.blob.Offset = binary.LittleEndian.Uint32(b[36:])
	e.blob.Length = binary.LittleEndian.Uint32(b[40:])
	e.blob.UncompressedLength = binary.LittleEndian.Uint32(b[44:])
	return e
}

// prefix is what the page directory holds of an ID.
func prefix(id []byte) uint64 { return binary.BigEndian.Uint64(id) }
