// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// packRecord is a pack of a table, with the number of the index file that
// lists it.
type packRecord struct {
	id     pack.ID
	source uint32
}

// tableWriter writes a table from front to back: its counts come first, so
// they must be known.
type tableWriter struct {
	rec       recordWriter
	header    header
	directory []uint64
	entries   int64
	last      entry
}

func newTableWriter(w io.Writer, h header, sources []pack.ID, packs []packRecord) (*tableWriter, error) {
	if h.packs > maxPacks {
		return nil, fmt.Errorf("write index table: %d packs are too many", h.packs)
	}
	t := &tableWriter{rec: recordWriter{w: w}, header: h}
	b, err := t.rec.next(headerSize)
	if err != nil {
		return nil, err
	}
	h.put(b)
	if err := t.rec.flush(); err != nil {
		return nil, err
	}
	for _, id := range sources {
		if b, err = t.rec.next(sourceSize); err != nil {
			return nil, err
		}
		copy(b, id[:])
	}
	if err := t.rec.flush(); err != nil {
		return nil, err
	}
	for _, p := range packs {
		if b, err = t.rec.next(packSize); err != nil {
			return nil, err
		}
		copy(b, p.id[:])
		binary.LittleEndian.PutUint32(b[32:], p.source)
	}
	return t, t.rec.flush()
}

// add writes the next entry; they come in their order.
func (t *tableWriter) add(e entry) error {
	if t.entries > 0 && t.last.compare(e) > 0 {
		return fmt.Errorf("write index table: entries are out of order: %w", ErrDamaged)
	}
	page := t.rec.number
	b, err := t.rec.next(entrySize)
	if err != nil {
		return err
	}
	e.put(b)
	if t.entries == 0 || t.rec.number != page {
		t.directory = append(t.directory, prefix(e.blob.ID[:]))
	}
	t.last = e
	t.entries++
	return nil
}

func (t *tableWriter) finish() error {
	if t.entries != t.header.entries {
		return fmt.Errorf("write index table: %d entries instead of %d: %w", t.entries, t.header.entries, ErrDamaged)
	}
	if err := t.rec.flush(); err != nil {
		return err
	}
	for _, p := range t.directory {
		b, err := t.rec.next(prefixSize)
		if err != nil {
			return err
		}
		binary.LittleEndian.PutUint64(b, p)
	}
	return t.rec.flush()
}

// WriteTable writes the table of one index file, which lists packs.
func WriteTable(w io.Writer, source pack.ID, packs []Pack) error {
	records := make([]packRecord, len(packs))
	var entries []entry
	for i, p := range packs {
		records[i] = packRecord{id: p.ID}
		for _, b := range p.Blobs {
			entries = append(entries, entry{blob: b, pack: uint32(i)})
		}
	}
	slices.SortFunc(entries, entry.compare)
	h := header{sources: 1, packs: int64(len(packs)), entries: int64(len(entries))}
	t, err := newTableWriter(w, h, []pack.ID{source}, records)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := t.add(e); err != nil {
			return err
		}
	}
	return t.finish()
}
