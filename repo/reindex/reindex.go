// SPDX-License-Identifier: BSD-2-Clause

// Package reindex makes the index of a repository anew from the headers of its
// packs.
//
// It promises that afterwards every pack in the store whose header can be read
// is listed, once and as the header says, and no other; that of the others each
// blob which an index lists and which is intact lies in another pack that is
// listed; that all new files are stored before an old index file is deleted, and
// no pack is; and that a store which does not answer is never taken for a damaged
// pack. The caller holds an exclusive lock;
// the index need not be loadable. It knows nothing of what the blobs are for.
package reindex

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// Options say how to make the index.
type Options struct {
	// ReadAllPacks reads every pack's header. Else the index files that can be
	// read are believed about packs of the size that they ask for.
	ReadAllPacks bool
	Progress     func(phase string, done, total int64) // may be nil
	Say          func(string)                          // what is changed, a line each; may be nil
}

// Summary says what was done.
type Summary struct {
	MessageType     string    `json:"message_type"` // "summary"
	PacksRead       int       `json:"packs_read"`
	PacksAdded      int       `json:"packs_added"`
	PacksChanged    int       `json:"packs_changed"`    // listed with another size
	PacksMissing    int       `json:"packs_missing"`    // listed, and not in the store
	PacksBad        []repo.ID `json:"packs_unreadable"` // their headers; not listed any more
	PacksSalvaged   []repo.ID `json:"packs_salvaged"`   // those of them of which blobs were stored anew
	BlobsKept       int       `json:"blobs_kept"`       // so many
	BlobsLost       int       `json:"blobs_lost"`       // that an index lists in them and that are not intact
	IndexesBad      int       `json:"indexes_unreadable"`
	IndexesWritten  int       `json:"indexes_written"`
	IndexesRemoved  int       `json:"indexes_removed"`
	DurationSeconds float64   `json:"duration_seconds"`
}

// run is one run.
type run struct {
	Options
	repo   *repo.Repository
	sum    *Summary
	good   []repo.ID         // index files
	broken []repo.ID         // index files
	why    map[repo.ID]error // the headers of packs cannot be read
	listed map[repo.ID]int64 // size of each pack by the index
	read   map[repo.ID]int64 // size of the packs to read
	drop   map[repo.ID]bool  // packs of which the old entries go
}

// Reindex makes the index anew.
func Reindex(ctx context.Context, r *repo.Repository, o Options) (*Summary, error) {
	started := time.Now()
	x := &run{
		Options: o, repo: r, sum: &Summary{MessageType: "summary", PacksBad: []repo.ID{}, PacksSalvaged: []repo.ID{}},
		why: map[repo.ID]error{}, listed: map[repo.ID]int64{}, read: map[repo.ID]int64{}, drop: map[repo.ID]bool{},
	}
	if err := x.run(ctx); err != nil {
		return nil, fmt.Errorf("repair index: %w", err)
	}
	x.sum.DurationSeconds = time.Since(started).Seconds()
	return x.sum, nil
}

func (x *run) run(ctx context.Context) error {
	if err := x.repo.RequireWritable(); err != nil {
		return err
	}
	if err := x.loadIndex(ctx); err != nil {
		return err
	}
	if err := x.compare(ctx); err != nil {
		return err
	}
	did, err := x.repo.RewriteIndex(ctx, repo.IndexRewrite{
		Drop: func(id repo.ID) bool { return x.ReadAllPacks || x.drop[id] },
		Add:  x.readPacks, All: x.ReadAllPacks, Broken: x.broken,
	})
	x.sum.IndexesWritten, x.sum.IndexesRemoved = did.Written, did.Removed
	if err != nil {
		return err
	}
	if err := x.repo.LoadIndex(ctx); err != nil {
		return err
	}
	_, err = x.repo.CleanCache(ctx)
	return err
}

// loadIndex reads what the index says of each pack's size, from all files that
// can be read.
func (x *run) loadIndex(ctx context.Context) error {
	files, err := x.repo.ListFiles(ctx, backend.IndexFile)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, min(4, x.repo.Backend().Connections())))
	for id := range files {
		g.Go(func() error {
			packs, err := x.repo.LoadIndexFile(gctx, id)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errors.Is(err, repo.ErrDamaged):
				x.say("index %s cannot be read and is removed: %v", id.Str(), err)
				x.broken = append(x.broken, id)
				x.sum.IndexesBad++
				return nil
			case err != nil:
				return err
			}
			x.good = append(x.good, id)
			for _, p := range packs {
				size := repo.PackFileSize(p.Blobs)
				if old, again := x.listed[p.ID]; again {
					// Either the same once more, or parts: then read the pack.
					if old != size {
						size = -1
					}
				}
				x.listed[p.ID] = size
			}
			return nil
		})
	}
	return g.Wait()
}

// compare finds the packs that must be read.
func (x *run) compare(ctx context.Context) error {
	files, err := x.repo.ListFiles(ctx, backend.PackFile)
	if err != nil {
		return err
	}
	for id, size := range files {
		listed, ok := x.listed[id]
		switch {
		case !ok:
			x.say("pack %s is in no index", id.Str())
			x.sum.PacksAdded++
		case listed != size:
			x.say("pack %s has %d bytes, and the index says otherwise", id.Str(), size)
			x.sum.PacksChanged++
		case !x.ReadAllPacks:
			continue
		}
		x.read[id] = size
		x.drop[id] = true
	}
	for id := range x.listed {
		if _, ok := files[id]; !ok {
			x.say("pack %s is missing and is not listed any more", id.Str())
			x.drop[id] = true
			x.sum.PacksMissing++
		}
	}
	return nil
}

// readPacks reads headers and hands them on, and saves what it can of packs that have
// none.
func (x *run) readPacks(ctx context.Context, add func(repo.IndexPack) error) error {
	ids := make([]repo.ID, 0, len(x.read))
	for id := range x.read {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, repo.ID.Compare)
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, x.repo.Backend().Connections()))
	for _, id := range ids {
		g.Go(func() error {
			blobs, err := x.header(gctx, id)
			mu.Lock()
			defer mu.Unlock()
			x.sum.PacksRead++
			if x.Progress != nil {
				x.Progress("reading packs", int64(x.sum.PacksRead), int64(len(ids)))
			}
			if err != nil {
				if !damaged(err) {
					return err
				}
				x.sum.PacksBad = append(x.sum.PacksBad, id)
				x.why[id] = err
				return nil
			}
			return add(repo.IndexPack{ID: id, Blobs: blobs})
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return x.salvage(ctx)
}

// header reads a header, and once more if it is bad: the damage may have
// happened on the way.
func (x *run) header(ctx context.Context, id repo.ID) ([]repo.BlobLocation, error) {
	blobs, err := x.repo.ListPack(ctx, id, x.read[id])
	if err != nil && damaged(err) {
		blobs, err = x.repo.ListPack(ctx, id, x.read[id])
	}
	return blobs, err
}

func damaged(err error) bool {
	return errors.Is(err, pack.ErrFormat) || errors.Is(err, crypto.ErrUnauthenticated) || errors.Is(err, backend.ErrRange)
}

func (x *run) say(format string, args ...any) {
	if x.Say != nil {
		x.Say(fmt.Sprintf(format, args...))
	}
}
