// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/dsync-backup/dsync-backup/repo/index"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// Catalog is the loaded index as it was at one moment, in one sorted table:
// each place of each blob has a position there, so that whoever deals with the
// whole repository needs a bit for a blob and not a map. With a cache the table
// lies in a file that has no name, else in memory, 48 bytes a place. It is safe
// for concurrent use.
type Catalog struct {
	table  *index.Table
	file   *os.File
	packs  []ID
	number []int32 // of the table's packs in packs
	listed []index.ListedPack
}

// Place is one place of a blob. Lengths and offsets are in bytes.
type Place struct {
	Position           int64 // in the catalog
	Pack               int32 // number in Packs
	Offset             uint32
	Length             uint32 // as stored
	UncompressedLength uint32 // 0 if it is not compressed
}

// Blob is the place as it is in its pack.
func (p Place) Blob(h BlobHandle) BlobLocation {
	return BlobLocation{Handle: h, Offset: p.Offset, Length: p.Length, UncompressedLength: p.UncompressedLength}
}

// Catalog makes one of the index as loaded now: of all of it, or none.
func (r *Repository) Catalog() (*Catalog, error) {
	r.loadMu.Lock()
	c, err := r.makeCatalog()
	tables := r.tables.list()
	r.loadMu.Unlock()
	if !errors.Is(err, index.ErrDamaged) {
		return c, err
	}
	// A table of the cache has gone bad since it was opened.
	var bad []*openTable
	for _, t := range tables {
		if t.Each(func(BlobHandle, Location) error { return nil }) != nil {
			bad = append(bad, t)
		}
	}
	if err := r.heal(bad); err != nil {
		return nil, err
	}
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	return r.makeCatalog()
}

func (r *Repository) makeCatalog() (c *Catalog, err error) {
	var tables []*index.Table
	for _, t := range r.tables.list() {
		tables = append(tables, t.Table)
	}
	c = &Catalog{}
	write := func(w io.Writer) error { return index.MergeTables(w, tables) }
	if r.cache != nil {
		c.file, err = r.cache.scratchFile()
		if err != nil {
			r.log.Warn("cannot work on the index in the cache, taking memory", "error", err)
		}
	}
	if c.file != nil {
		var size int64
		if err = writeBuffered(c.file, write); err == nil {
			size, err = c.file.Seek(0, io.SeekEnd)
		}
		if err == nil {
			c.table, err = index.OpenTable(c.file, size)
		}
	} else {
		var buf bytes.Buffer
		if err = write(&buf); err == nil {
			c.table, err = index.OpenTable(bytes.NewReader(buf.Bytes()), int64(buf.Len()))
		}
	}
	if err == nil {
		c.listed, err = c.table.Packs()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("sort the index: %w", err), c.Close())
	}
	numbers := make(map[ID]int32, len(c.listed))
	c.number = make([]int32, len(c.listed))
	for i, l := range c.listed {
		n, ok := numbers[l.ID]
		if !ok {
			n = int32(len(c.packs))
			numbers[l.ID] = n
			c.packs = append(c.packs, l.ID)
		}
		c.number[i] = n
	}
	return c, nil
}

// Close frees the table.
func (c *Catalog) Close() error {
	if c.file == nil {
		return nil
	}
	return c.file.Close()
}

// Len is the number of positions.
func (c *Catalog) Len() int64 { return c.table.Entries() }

// Packs are the packs that the index lists, each once, by their number.
func (c *Catalog) Packs() []ID { return c.packs }

// Sources are the index files that list each pack.
func (c *Catalog) Sources() map[ID][]ID {
	out := make(map[ID][]ID, len(c.packs))
	for _, l := range c.listed {
		out[l.ID] = append(out[l.ID], l.Source)
	}
	return out
}

// Find is the first position of a blob.
func (c *Catalog) Find(h BlobHandle) (int64, bool, error) { return c.table.Position(h) }

// EachBlob calls fn once for every blob, in the order of their positions, with
// its places in packs, each once. places is good during the call. An error of
// fn, or the end of ctx, ends it.
func (c *Catalog) EachBlob(ctx context.Context, fn func(h BlobHandle, places []Place) error) error {
	var (
		now    BlobHandle
		places []Place
	)
	flush := func() error {
		if len(places) == 0 {
			return nil
		}
		err := fn(now, places)
		places = places[:0]
		return err
	}
	err := c.table.EachEntry(func(at int64, b pack.Blob, packNumber uint32) error {
		if b.Handle != now {
			if err := flush(); err != nil {
				return err
			}
			now = b.Handle
		}
		if at%4096 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p := Place{at, c.number[packNumber], b.Offset, b.Length, b.UncompressedLength}
		for _, other := range places { // several index files may list one pack
			if other.Pack == p.Pack && other.Offset == p.Offset {
				return nil
			}
		}
		places = append(places, p)
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// Bits is a set of positions. Its methods may be called from many goroutines.
type Bits struct{ words []atomic.Uint64 }

// NewBits is an empty set of positions below n.
func NewBits(n int64) *Bits { return &Bits{make([]atomic.Uint64, (n+63)/64)} }

// Set adds i and reports whether it was missing.
func (b *Bits) Set(i int64) bool {
	mask := uint64(1) << (i % 64)
	return b.words[i/64].Or(mask)&mask == 0
}

// Clear takes i out.
func (b *Bits) Clear(i int64) { b.words[i/64].And(^(uint64(1) << (i % 64))) }

// Has reports whether i is in the set.
func (b *Bits) Has(i int64) bool { return b.words[i/64].Load()>>(i%64)&1 != 0 }
