// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"container/heap"
	"fmt"
	"io"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// MergeTables writes one table that answers as all of tables together, so that
// a repository with very many index files is still looked up in few places.
// What comes from index files that are no longer listed is left out. It holds
// the lists of packs in memory, but not the entries.
func MergeTables(w io.Writer, tables []*Table) error {
	var (
		h       header
		sources []pack.ID
		packs   []packRecord
		streams mergeHeap
	)
	for _, t := range tables {
		s, err := newStream(t, &sources, &packs)
		if err != nil {
			return err
		}
		h.entries += s.live
		if ok, err := s.next(); err != nil {
			return err
		} else if ok {
			streams = append(streams, s)
		}
	}
	h.sources, h.packs = int64(len(sources)), int64(len(packs))
	out, err := newTableWriter(w, h, sources, packs)
	if err != nil {
		return err
	}
	heap.Init(&streams)
	for len(streams) > 0 {
		s := streams[0]
		if err := out.add(s.head); err != nil {
			return err
		}
		if ok, err := s.next(); err != nil {
			return err
		} else if ok {
			heap.Fix(&streams, 0)
		} else {
			heap.Pop(&streams)
		}
	}
	return out.finish()
}

const gone = ^uint32(0) // number of a pack that the merged table leaves out

// stream reads a table's live entries, numbered as in the merged table.
type stream struct {
	table  *Table
	number []uint32 // of each of the table's packs in the merged table
	live   int64
	page   page
	at     int64 // number of the next entry
	head   entry
}

// newStream adds the table's live index files and packs to the merged ones and
// counts its live entries.
func newStream(t *Table, sources *[]pack.ID, packs *[]packRecord) (*stream, error) {
	source := make([]uint32, len(t.sources))
	for i, id := range t.sources {
		if !t.dead[i] {
			source[i] = uint32(len(*sources))
			*sources = append(*sources, id)
		}
	}
	records, err := t.packRecords()
	if err != nil {
		return nil, err
	}
	s := &stream{table: t, number: make([]uint32, len(records))}
	for i, rec := range records {
		s.number[i] = gone
		if !t.dead[rec.source] {
			s.number[i] = uint32(len(*packs))
			*packs = append(*packs, packRecord{rec.id, source[rec.source]})
		}
	}
	if len(t.Sources()) == len(t.sources) {
		s.live = t.header.entries
		return s, nil
	}
	return s, t.Each(func(pack.Handle, Location) error { s.live++; return nil })
}

// next reads the next live entry into head, or reports the end.
func (s *stream) next() (bool, error) {
	const per = payloadSize / entrySize
	for ; s.at < s.table.header.entries; s.at++ {
		if s.at%per == 0 {
			if err := readPage(s.table.r, s.table.header.entryPage()+s.at/per, &s.page); err != nil {
				return false, err
			}
		}
		s.head = parseEntry(s.page[s.at%per*entrySize:])
		if int64(s.head.pack) >= s.table.header.packs {
			return false, fmt.Errorf("read index table: pack number %d of %d: %w", s.head.pack, s.table.header.packs, ErrDamaged)
		}
		if s.head.pack = s.number[s.head.pack]; s.head.pack != gone {
			s.at++
			return true, nil
		}
	}
	return false, nil
}

type mergeHeap []*stream

func (h mergeHeap) Len() int           { return len(h) }
func (h mergeHeap) Less(i, j int) bool { return h[i].head.compare(h[j].head) < 0 }
func (h mergeHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *mergeHeap) Push(x any)        { *h = append(*h, x.(*stream)) }
func (h *mergeHeap) Pop() any {
	s := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return s
}
