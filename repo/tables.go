// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"sync"

	"github.com/dsync-backup/dsync-backup/repo/index"
)

// openTable is a lookup table and what it lies in.
type openTable struct {
	*index.Table
	file *os.File // nil if the table is in memory
	name string   // in the cache, "" if it is not there
}

func (t *openTable) close() error {
	if t.file == nil {
		return nil
	}
	return t.file.Close()
}

// memoryTable opens a table that is held in memory.
func memoryTable(data []byte, name string) (*openTable, error) {
	t, err := index.OpenTable(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return nil, err
	}
	return &openTable{Table: t, name: name}, nil
}

// openTable opens a table of the cache.
func (c *cache) openTable(name string) (*openTable, error) {
	f, err := os.Open(c.path(name))
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	t, err := index.OpenTable(f, info.Size())
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &openTable{Table: t, file: f, name: name}, nil
}

// tableSet is the tables that lookups go through. A table is closed only when
// no lookup is using it.
type tableSet struct {
	mu     sync.RWMutex
	tables []*openTable
}

// find collects the places of a blob, or just one of them, and the tables that
// turned out to be damaged.
func (s *tableSet) find(h BlobHandle, any bool) (found []Location, bad []*openTable) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, t := range s.tables {
		var err error
		if found, err = t.Find(found, h, any); err != nil {
			bad = append(bad, t)
		}
		if any && len(found) > 0 {
			break
		}
	}
	return found, bad
}

// each calls fn for every place of every blob.
func (s *tableSet) each(fn func(BlobHandle, Location) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, t := range s.tables {
		if err := t.Each(fn); err != nil {
			return err
		}
	}
	return nil
}

// list is the tables as of now. They stay open only as long as nobody calls
// replace, so the caller holds Repository.loadMu.
func (s *tableSet) list() []*openTable {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clone(s.tables)
}

// replace takes out and closes some tables and puts in others.
func (s *tableSet) replace(out, in []*openTable) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tables = slices.DeleteFunc(s.tables, func(t *openTable) bool { return slices.Contains(out, t) })
	s.tables = append(s.tables, in...)
	for _, t := range out {
		_ = t.close() // it was only read
	}
}

// retain makes all tables answer only for listed index files, and closes those
// for which none is left.
func (s *tableSet) retain(listed func(ID) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tables = slices.DeleteFunc(s.tables, func(t *openTable) bool {
		if t.Retain(listed) > 0 {
			return false
		}
		_ = t.close() // it was only read
		return true
	})
}

func (s *tableSet) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, t := range s.tables {
		errs = append(errs, t.close())
	}
	s.tables = nil
	return errors.Join(errs...)
}
