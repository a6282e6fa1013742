// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"fmt"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// ListedPack is a pack as one index file lists it.
type ListedPack struct {
	ID     pack.ID
	Source pack.ID // the index file
}

// Packs are the table's packs by their number, those of index files that are no
// longer listed included. A pack that several index files list is there several
// times.
func (t *Table) Packs() ([]ListedPack, error) {
	records, err := t.packRecords()
	if err != nil {
		return nil, err
	}
	out := make([]ListedPack, len(records))
	for i, rec := range records {
		out[i] = ListedPack{rec.id, t.sources[rec.source]}
	}
	return out, nil
}

// Position is the number of the first of the blob's entries in the table's
// order, from 0. It takes no notice of which index files are still listed.
func (t *Table) Position(h pack.Handle) (int64, bool, error) {
	const per = payloadSize / entrySize
	for i := t.firstPage(h.ID); i < len(t.directory) && t.directory[i] <= prefix(h.ID[:]); i++ {
		p, err := t.page(t.header.entryPage() + int64(i))
		if err != nil {
			return 0, false, err
		}
		n := t.entriesIn(i)
		for j := lowerBound(p, n, h.ID); j < n; j++ {
			e := parseEntry(p[j*entrySize:])
			if e.blob.ID != h.ID {
				return 0, false, nil
			}
			if e.blob.Type == h.Type {
				return int64(i)*per + int64(j), true, nil
			}
		}
	}
	return 0, false, nil
}

// EachEntry calls fn for every entry in the table's order (by ID, then type,
// then number of the pack) with the entry's number and that of its pack.
func (t *Table) EachEntry(fn func(position int64, b pack.Blob, pack uint32) error) error {
	at := int64(0)
	return t.records(t.header.entryPage(), t.header.entries, entrySize, func(b []byte) error {
		e := parseEntry(b)
		if int64(e.pack) >= t.header.packs {
			return fmt.Errorf("read index table: pack number %d of %d: %w", e.pack, t.header.packs, ErrDamaged)
		}
		at++
		return fn(at-1, e.blob, e.pack)
	})
}
