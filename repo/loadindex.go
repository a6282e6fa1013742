// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/index"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

const (
	indexFolder  = "index"
	mergedPrefix = "merged-"

	// A lookup asks every table. Beyond maxTables the smaller ones are merged,
	// up to mergeEntries in one, so that merging stays rare and cheap.
	maxTables    = 32
	mergeEntries = 2 << 20

	// convertersMax bounds how many index files are decoded at a time: each
	// takes some tens of MB meanwhile.
	convertersMax = 4

	healTimeout = 2 * time.Minute
)

// LoadIndex makes lookups answer from the index files that the store lists
// now. Those that the cache has a table of are not read again. Call it after
// taking the lock and after listing the snapshots, since a snapshot is written
// after its index; it may be called again. Where somebody has pruned since, it
// drops from the cache what is gone.
func (r *Repository) LoadIndex(ctx context.Context) error {
	if err := r.loadIndex(ctx, nil); err != nil {
		return err
	}
	return r.dropFreed(ctx)
}

// LoadGoodIndex is LoadIndex for whoever looks for damage, or makes do with what there
// is: it goes on without the index files that cannot be read, and names them.
func (r *Repository) LoadGoodIndex(ctx context.Context) (bad map[ID]error, err error) {
	bad = map[ID]error{}
	var mu sync.Mutex
	err = r.loadIndex(ctx, func(id ID, err error) {
		mu.Lock()
		defer mu.Unlock()
		bad[id] = err
	})
	if err == nil && len(bad) == 0 {
		err = r.dropFreed(ctx)
	}
	return bad, err
}

// dropFreed cleans the cache where index files that it knew have gone: somebody pruned,
// and what was freed is of no use there.
func (r *Repository) dropFreed(ctx context.Context) error {
	if !r.indexShrank.Swap(false) {
		return nil
	}
	_, err := r.CleanCache(ctx)
	return err
}

// loadIndex calls skip, from many goroutines, with the files that are damaged,
// gone or not readable, which are an error if it is nil.
func (r *Repository) loadIndex(ctx context.Context, skip func(ID, error)) error {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	files, err := listIDs(ctx, r.be, backend.IndexFile)
	if err != nil {
		return err
	}
	wanted := make(map[ID]bool, len(files)) // value: no table yet
	for _, f := range files {
		wanted[f.id] = true
	}
	isListed := func(id ID) bool { _, ok := wanted[id]; return ok }
	r.tables.retain(isListed)
	inUse := map[string]bool{}
	for _, t := range r.tables.list() {
		markCovered(wanted, t)
		inUse[t.name] = true
	}
	cached := r.openCachedTables(wanted, isListed, inUse)
	fresh, err := r.convertAll(ctx, wanted, skip)
	if err != nil {
		for _, t := range cached {
			_ = t.close()
		}
		return err
	}
	r.tables.replace(nil, append(cached, fresh...))
	r.mergeTables()
	return nil
}

func markCovered(wanted map[ID]bool, t *openTable) {
	for _, id := range t.Sources() {
		if wanted[id] {
			wanted[id] = false
		}
	}
}

// openCachedTables opens the tables of the cache that are still good for
// something and not in use yet, and drops those that are good for nothing.
func (r *Repository) openCachedTables(wanted map[ID]bool, isListed func(ID) bool, inUse map[string]bool) (tables []*openTable) {
	names := r.cache.list(indexFolder)
	// Merged tables first: they stand for many. Their names sort behind all
	// others, which are hex.
	slices.Sort(names)
	slices.Reverse(names)
	for _, base := range names {
		name := indexFolder + "/" + base
		if inUse[name] {
			continue
		}
		t, err := r.cache.openTable(name)
		if err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				r.log.Debug("dropping a cached index table", "name", base, "error", err)
				r.cache.remove(name)
			}
			continue
		}
		if all := len(t.Sources()); t.Retain(isListed) < all {
			r.indexShrank.Store(true)
		}
		if !slices.ContainsFunc(t.Sources(), func(id ID) bool { return wanted[id] }) {
			_ = t.close()
			r.cache.remove(name)
			continue
		}
		markCovered(wanted, t)
		tables = append(tables, t)
	}
	return tables
}

// convertAll makes tables of the index files that have none.
func (r *Repository) convertAll(ctx context.Context, wanted map[ID]bool, skip func(ID, error)) ([]*openTable, error) {
	var (
		mu     sync.Mutex
		tables []*openTable
	)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(min(convertersMax, runtime.GOMAXPROCS(0), max(1, r.be.Connections())))
	for id, missing := range wanted {
		if !missing {
			continue
		}
		g.Go(func() error {
			t, err := r.convert(ctx, id)
			if err != nil {
				if skip != nil && (errors.Is(err, ErrDamaged) || errors.Is(err, backend.ErrNotExist) || unreadable(err)) {
					skip(id, err)
					return nil
				}
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			tables = append(tables, t)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		for _, t := range tables {
			_ = t.close()
		}
		return nil, err
	}
	return tables, nil
}

func (r *Repository) convert(ctx context.Context, id ID) (*openTable, error) {
	plain, err := r.loadUnpacked(ctx, backend.IndexFile, id)
	if errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w (`repair index` makes the index anew)", err)
	}
	if err != nil {
		return nil, err
	}
	packs, err := index.Decode(plain)
	if err != nil {
		return nil, fmt.Errorf("load index %s: %w: %w (`repair index` makes the index anew)", id.Str(), ErrDamaged, err)
	}
	return r.makeTable(id, packs)
}

// makeTable makes the table of one index file, in the cache where possible.
func (r *Repository) makeTable(id ID, packs []index.Pack) (*openTable, error) {
	return r.storeTable(indexFolder+"/"+id.String(), func(w io.Writer) error {
		return index.WriteTable(w, id, packs)
	})
}

// storeTable makes a table with what write writes, in the cache where
// possible, else in memory.
func (r *Repository) storeTable(name string, write func(io.Writer) error) (*openTable, error) {
	if r.cache != nil {
		written, err := r.cache.writeWith(name, func(f *os.File) error { return writeBuffered(f, write) })
		if written {
			var t *openTable
			if t, err = r.cache.openTable(name); err == nil {
				return t, nil
			}
		}
		if err != nil {
			r.log.Warn("cannot keep an index table in the cache", "error", err)
		}
	}
	var buf bytes.Buffer
	if err := write(&buf); err != nil {
		return nil, err
	}
	if r.cache != nil {
		r.cache.save(name, buf.Bytes())
	}
	return memoryTable(buf.Bytes(), name)
}

// addTable makes the entries of a new index file visible.
func (r *Repository) addTable(id ID, packs []index.Pack) error {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	t, err := r.makeTable(id, packs)
	if err != nil {
		return fmt.Errorf("keep index %s: %w", id.Str(), err)
	}
	r.tables.replace(nil, []*openTable{t})
	if len(r.tables.list()) > 2*maxTables {
		r.mergeTables()
	}
	return nil
}

// mergeTables merges the smaller tables when there are too many. The caller
// holds loadMu. A failure only leaves lookups slower.
func (r *Repository) mergeTables() {
	tables := r.tables.list()
	if len(tables) <= maxTables || r.cache != nil && r.cache.isDeferred() {
		return
	}
	slices.SortStableFunc(tables, func(a, b *openTable) int { return int(a.Entries() - b.Entries()) })
	for len(tables) > 0 {
		n, sum := 0, int64(0)
		for n < len(tables) && sum+tables[n].Entries() <= mergeEntries {
			sum += tables[n].Entries()
			n++
		}
		if n < 2 {
			return
		}
		if err := r.mergeGroup(tables[:n]); err != nil {
			r.log.Warn("cannot merge index tables", "error", err)
			return
		}
		tables = tables[n:]
	}
}

func (r *Repository) mergeGroup(group []*openTable) error {
	var sources []byte
	plain := make([]*index.Table, len(group))
	for i, t := range group {
		plain[i] = t.Table
		for _, id := range t.Sources() {
			sources = append(sources, id[:]...)
		}
	}
	name := indexFolder + "/" + mergedPrefix + Hash(sources).String()
	merged, err := r.storeTable(name, func(w io.Writer) error { return index.MergeTables(w, plain) })
	if err != nil {
		return err
	}
	r.tables.replace(group, []*openTable{merged})
	for _, t := range group {
		if t.name != name {
			r.cache.remove(t.name)
		}
	}
	return nil
}

// heal puts tables made from the store in place of damaged ones. If that fails
// the blobs in question count as unknown until LoadIndex is called again. To a
// writer that costs space; who deletes what is not needed must take it for an
// error.
func (r *Repository) heal(bad []*openTable) error {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), healTimeout)
	defer cancel()
	current := r.tables.list()
	var first error
	for _, t := range bad {
		if !slices.Contains(current, t) {
			continue // somebody else was faster
		}
		r.log.Warn("a cached index table is damaged and is made anew", "name", t.name)
		wanted := map[ID]bool{}
		for _, id := range t.Sources() {
			wanted[id] = true
		}
		r.cache.remove(t.name)
		fresh, err := r.convertAll(ctx, wanted, nil)
		if err != nil {
			r.log.Error("cannot replace a damaged index table", "error", err)
			if first == nil {
				first = fmt.Errorf("replace a damaged index table: %w", err)
			}
		}
		r.tables.replace([]*openTable{t}, fresh)
	}
	return first
}

// find looks a blob up, and mends the tables on the way if it has to.
func (r *Repository) find(h BlobHandle, any bool) []Location {
	found, bad := r.tables.find(h, any)
	if len(bad) > 0 {
		_ = r.heal(bad) // it is in the log
		found, _ = r.tables.find(h, any)
	}
	return found
}

// Has reports whether the index knows the blob.
func (r *Repository) Has(h BlobHandle) bool {
	_, ok := r.Lookup(h)
	return ok
}

// Lookup is one place of a blob.
func (r *Repository) Lookup(h BlobHandle) (Location, bool) {
	if found := r.find(h, true); len(found) > 0 {
		return found[0], true
	}
	return Location{}, false
}

// Locations is every place of a blob: several packs may hold it.
func (r *Repository) Locations(h BlobHandle) []Location { return r.find(h, false) }

// BlobSize is the length of a blob's plaintext, in bytes.
func (r *Repository) BlobSize(h BlobHandle) (int, bool) {
	loc, ok := r.Lookup(h)
	if !ok {
		return 0, false
	}
	return blobAt(h, loc).PlainLength(), true
}

// EachBlob calls fn for every place of every blob in the index. fn must not
// call other methods of the repository.
func (r *Repository) EachBlob(ctx context.Context, fn func(BlobHandle, Location) error) error {
	return r.tables.each(func(h BlobHandle, loc Location) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return fn(h, loc)
	})
}

// IndexFiles are the index files that lookups answer from: those that LoadIndex
// found, and those that were written here since.
func (r *Repository) IndexFiles() map[ID]bool {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	out := map[ID]bool{}
	for _, t := range r.tables.list() {
		for _, id := range t.Sources() {
			out[id] = true
		}
	}
	return out
}

func blobAt(h BlobHandle, loc Location) pack.Blob {
	return pack.Blob{Handle: h, Offset: loc.Offset, Length: loc.Length, UncompressedLength: loc.UncompressedLength}
}

func writeBuffered(f *os.File, write func(io.Writer) error) error {
	w := bufio.NewWriterSize(f, 1<<20)
	if err := write(w); err != nil {
		return err
	}
	return w.Flush()
}
