// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/index"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// IndexPack lists the blobs of a pack.
type IndexPack = index.Pack

// PackFileSize is how long a pack of these blobs is, in bytes.
func PackFileSize(blobs []BlobLocation) int64 { return packSize(blobs) }

// LoadIndexFile loads one index file: what it says of each pack. A damaged one
// is [ErrDamaged].
func (r *Repository) LoadIndexFile(ctx context.Context, id ID) ([]IndexPack, error) {
	plain, err := r.loadUnpacked(ctx, backend.IndexFile, id)
	if err != nil {
		return nil, err
	}
	packs, err := index.Decode(plain)
	if err != nil {
		return nil, fmt.Errorf("load index %s: %w: %w", id.Str(), ErrDamaged, err)
	}
	return packs, nil
}

// ListFiles lists the files of a type by their IDs, with their sizes in bytes.
func (r *Repository) ListFiles(ctx context.Context, t backend.FileType) (map[ID]int64, error) {
	files, err := listIDs(ctx, r.be, t)
	if err != nil {
		return nil, err
	}
	out := make(map[ID]int64, len(files))
	for _, f := range files {
		out[f.id] = f.size
	}
	return out, nil
}

// RemoveFiles deletes files, several at a time, and calls done with each, one
// at a time; one that is gone already is no error. A file that the store refuses
// to delete does not keep it from the others. Any other failure has outlasted
// its retries, as each of the others would: it ends the work, is returned, and is
// what done gets for all that were not tried. Else the first error is returned.
func (r *Repository) RemoveFiles(ctx context.Context, t backend.FileType, ids []ID, done func(ID, error)) error {
	var (
		mu    sync.Mutex
		first error
	)
	removing, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	var g errgroup.Group
	g.SetLimit(max(1, r.be.Connections()))
	for _, id := range ids {
		g.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			err := context.Cause(removing)
			if err == nil {
				err = r.be.Remove(removing, backend.Handle{Type: t, Name: id.String()})
			}
			if errors.Is(err, backend.ErrNotExist) {
				err = nil
			}
			mu.Lock()
			defer mu.Unlock()
			ends := err != nil && !errors.Is(err, backend.ErrPermanent)
			if err != nil && first == nil || ends && removing.Err() == nil {
				first = fmt.Errorf("remove %s %s: %w", t, id.Str(), err)
			}
			if ends {
				giveUp(first)
			}
			if done != nil {
				done(id, err)
			}
			return nil
		})
	}
	return errors.Join(g.Wait(), first)
}

// IndexRewrite says how the index files are to change.
type IndexRewrite struct {
	// Drop names packs that are not to be listed any more. It may be nil.
	Drop func(ID) bool
	// Add gives packs to list instead of what is said of them now; it may be
	// nil. It calls its argument from one goroutine.
	Add func(ctx context.Context, add func(IndexPack) error) error
	// All has every index file written anew. Else those that are full and need
	// no change stay, so that nobody has to read them again.
	All bool
	// Broken are index files that cannot be read and go.
	Broken []ID
	// Twice are the packs that are listed several times, if that is known. Unless
	// it is known that there are none every file is read once more.
	Twice map[ID]bool
	// BeforeRemoval, if set, is called when all new files are stored and no old one
	// is deleted; with its error everything stays.
	BeforeRemoval func(context.Context) error
	// Progress is told how many of the old files have been dealt with.
	Progress func(done, total int)
}

// IndexRewritten says what a rewrite did.
type IndexRewritten struct{ Kept, Written, Removed int }

// RewriteIndex replaces index files by others that list each pack exactly once.
// All new files are stored before the first old one is deleted; an old one that
// cannot be deleted is an error. Whatever dies in between leaves packs listed
// twice, and nothing unlisted that is not dropped. The caller holds an exclusive
// lock; afterwards it calls LoadIndex. Memory: the largest index file, some 100
// bytes a pack, and the blobs of packs of which several listings say different
// things.
func (r *Repository) RewriteIndex(ctx context.Context, o IndexRewrite) (IndexRewritten, error) {
	w := newIndexRewriter(r, o)
	if err := w.run(ctx); err != nil {
		return w.did, fmt.Errorf("rewrite the index: %w", err)
	}
	return w.did, nil
}

type indexRewriter struct {
	repo     *Repository
	o        IndexRewrite
	did      IndexRewritten
	listed   map[ID]bool        // by a new file, or by one that stays
	differ   map[ID]bool        // listed several times, not always the same
	split    map[ID][]pack.Blob // what those list, all together
	pending  []index.Pack
	blobs    int
	obsolete []ID
}

func newIndexRewriter(r *Repository, o IndexRewrite) *indexRewriter {
	return &indexRewriter{repo: r, o: o, listed: map[ID]bool{}, split: map[ID][]pack.Blob{}}
}

func (w *indexRewriter) run(ctx context.Context) error {
	old, err := listIDs(ctx, w.repo.be, backend.IndexFile)
	if err != nil {
		return err
	}
	w.obsolete = slices.Clone(w.o.Broken)
	slices.SortFunc(old, func(a, b listed) int { return a.id.Compare(b.id) })
	if w.o.Add != nil {
		err := w.o.Add(ctx, func(p index.Pack) error {
			if w.listed[p.ID] {
				return nil
			}
			return w.add(ctx, p)
		})
		if err != nil {
			return err
		}
	}
	if w.o.Twice == nil || len(w.o.Twice) > 0 {
		if err := w.compareListings(ctx, old); err != nil {
			return err
		}
	}
	for i, f := range old {
		if w.o.Progress != nil {
			w.o.Progress(i, len(old))
		}
		if slices.Contains(w.o.Broken, f.id) {
			continue
		}
		if err := w.file(ctx, f.id); err != nil {
			return err
		}
	}
	for id, blobs := range w.split {
		if err := w.add(ctx, index.Pack{ID: id, Blobs: slices.Compact(sorted(blobs))}); err != nil {
			return err
		}
	}
	if err := w.save(ctx); err != nil {
		return err
	}
	if w.o.BeforeRemoval != nil {
		if err := w.o.BeforeRemoval(ctx); err != nil {
			return err
		}
	}
	if err := w.repo.CheckLock(ctx); err != nil {
		return err
	}
	err = w.repo.RemoveFiles(ctx, backend.IndexFile, w.obsolete, func(_ ID, err error) {
		if err == nil {
			w.did.Removed++
		}
	})
	return err
}

// compareListings finds the packs that are listed several times and not always the same:
// programs of old listed different blobs of a pack in each index file. After a rewrite that was
// killed all packs are listed twice, but the same.
func (w *indexRewriter) compareListings(ctx context.Context, old []listed) error {
	w.differ = map[ID]bool{}
	first := map[ID]ID{} // what the first listing of a pack says
	for _, f := range old {
		if slices.Contains(w.o.Broken, f.id) {
			continue
		}
		packs, err := w.repo.LoadIndexFile(ctx, f.id)
		if err != nil {
			return err
		}
		for _, p := range packs {
			if w.o.Twice != nil && !w.o.Twice[p.ID] || w.drops(p.ID) {
				continue
			}
			says := digest(p.Blobs)
			if before, ok := first[p.ID]; ok && before != says {
				w.differ[p.ID] = true
			} else if !ok {
				first[p.ID] = says
			}
		}
	}
	return nil
}

// digest is the same for the same blobs in any order.
func digest(blobs []pack.Blob) ID {
	b := make([]byte, 0, len(blobs)*(len(ID{})+13))
	for _, blob := range sorted(blobs) {
		b = append(append(b, blob.ID[:]...), byte(blob.Type))
		for _, n := range []uint32{blob.Offset, blob.Length, blob.UncompressedLength} {
			b = binary.LittleEndian.AppendUint32(b, n)
		}
	}
	return Hash(b)
}

func sorted(blobs []pack.Blob) []pack.Blob {
	return slices.SortedFunc(slices.Values(blobs), func(a, b pack.Blob) int {
		return cmp.Or(cmp.Compare(a.Offset, b.Offset), a.ID.Compare(b.ID), cmp.Compare(a.Type, b.Type),
			cmp.Compare(a.Length, b.Length), cmp.Compare(a.UncompressedLength, b.UncompressedLength))
	})
}

// file deals with one old index file.
func (w *indexRewriter) file(ctx context.Context, id ID) error {
	packs, err := w.repo.LoadIndexFile(ctx, id)
	if err != nil {
		return err
	}
	blobs, changes := 0, w.o.All
	for _, p := range packs {
		blobs += len(p.Blobs)
		changes = changes || w.listed[p.ID] || w.differ[p.ID] || w.drops(p.ID)
	}
	if !changes && blobs >= indexBlobs && blobs < 4*indexBlobs {
		w.did.Kept++
		for _, p := range packs {
			w.listed[p.ID] = true
		}
		return nil
	}
	w.obsolete = append(w.obsolete, id)
	for _, p := range packs {
		switch {
		case w.drops(p.ID) || w.listed[p.ID]:
		case w.differ[p.ID]:
			w.split[p.ID] = append(w.split[p.ID], p.Blobs...)
		default:
			if err := w.add(ctx, p); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *indexRewriter) drops(id ID) bool { return w.o.Drop != nil && w.o.Drop(id) }

func (w *indexRewriter) add(ctx context.Context, p index.Pack) error {
	w.listed[p.ID] = true
	if len(p.Blobs) == 0 {
		return nil
	}
	w.pending = append(w.pending, p)
	if w.blobs += len(p.Blobs); w.blobs < indexBlobs {
		return nil
	}
	return w.save(ctx)
}

func (w *indexRewriter) save(ctx context.Context) error {
	if len(w.pending) == 0 {
		return nil
	}
	plain, err := index.Encode(w.pending)
	if err != nil {
		return err
	}
	if err := w.repo.CheckLock(ctx); err != nil {
		return err
	}
	id, _, err := w.repo.saveUnpacked(ctx, backend.IndexFile, plain)
	if err != nil {
		return err
	}
	w.did.Written++
	// Whoever looks a blob up from here on needs the table anyway.
	err = w.repo.addTable(id, w.pending)
	w.pending, w.blobs = nil, 0
	return err
}
