// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// The phases that progress tells of.
const (
	PhaseMark   = "finding what is used"
	PhaseRepack = "packing anew"
	PhaseIndex  = "rewriting the index"
	PhaseRemove = "deleting packs"
)

// smallIndexes is from how many index files on that are not full a prune puts
// them together, though nothing else asks for it.
const smallIndexes = 16

// pruner is one run.
type pruner struct {
	Options
	repo      *repo.Repository
	snapshots map[repo.ID]*repo.Snapshot
	sum       *Summary

	toRemove, stay int   // packs, and those of them that could not be deleted
	stayed         error // why the first one could not
}

// Prune frees what no snapshot needs. The repository is locked exclusively and
// its index is loaded. An error that is [ErrIncomplete] or [ErrChanged] comes
// before anything that a snapshot needs was deleted.
func Prune(ctx context.Context, r *repo.Repository, o Options) (*Summary, error) {
	p := &pruner{Options: o, repo: r, sum: &Summary{MessageType: "summary", DryRun: o.DryRun}}
	started := time.Now()
	if err := p.run(ctx); err != nil {
		return nil, fmt.Errorf("prune: %w", err)
	}
	p.sum.DurationSeconds = time.Since(started).Seconds()
	return p.sum, nil
}

func (p *pruner) run(ctx context.Context) error {
	if !p.DryRun || p.RepackUncompressed {
		if err := p.repo.RequireWritable(); err != nil {
			return err
		}
	}
	var err error
	if p.snapshots, err = p.loadSnapshots(ctx); err != nil {
		return err
	}
	p.sum.Snapshots = len(p.snapshots)
	catalog, err := p.repo.Catalog()
	if err != nil {
		return err
	}
	defer catalog.Close()
	plan, err := p.plan(ctx, catalog)
	if err != nil || p.DryRun {
		return err
	}
	return p.execute(ctx, plan)
}

// loadSnapshots loads all snapshots. What cannot be read might need anything.
func (p *pruner) loadSnapshots(ctx context.Context) (map[repo.ID]*repo.Snapshot, error) {
	out := map[repo.ID]*repo.Snapshot{}
	err := p.repo.ListSnapshots(ctx, func(id repo.ID, s *repo.Snapshot, err error) error {
		if p.Ignore[id] {
			return nil
		}
		if err != nil {
			return fmt.Errorf("a snapshot cannot be read, and what it needs is not known: %w (nothing was deleted; `forget %s` gives it up)", err, id.Str())
		}
		out[id] = s
		return nil
	})
	return out, err
}

func (p *pruner) plan(ctx context.Context, catalog *repo.Catalog) (*plan, error) {
	m := &marks{
		repo: p.repo, catalog: catalog, isMeta: p.IsMeta,
		used: repo.NewBits(catalog.Len()), meta: repo.NewBits(catalog.Len()),
	}
	p.tell(PhaseMark, 0, int64(len(p.snapshots)))
	if err := m.mark(ctx, p.snapshots); err != nil {
		return nil, err
	}
	files, err := p.repo.ListFiles(ctx, backend.PackFile)
	if err != nil {
		return nil, err
	}
	x := &plan{opts: p.Options, packSize: p.repo.PackSize(), catalog: catalog, marks: m, files: files, sum: p.sum}
	return x, x.decide(ctx)
}

// execute carries a plan out. The order is what makes it safe to be killed.
// Before each kind of deletion it looks whether somebody added something.
func (p *pruner) execute(ctx context.Context, x *plan) error {
	if err := p.stillUnchanged(ctx); err != nil {
		return err
	}
	if err := p.removePacks(ctx, x.leftover); err != nil {
		return err
	}
	if err := p.repack(ctx, x); err != nil {
		return err
	}
	packs, unlisted := x.gone()
	if err := p.rewriteIndex(ctx, x, unlisted); err != nil {
		return err
	}
	if len(packs) > 0 {
		if err := p.unchanged(ctx); err != nil {
			return fmt.Errorf("%w; the index lists %d packs no more that may be needed now and are still there: run `repair index`, then `check`", err, len(packs))
		}
	}
	if err := p.removePacks(ctx, packs); err != nil {
		return err
	}
	if err := p.repo.LoadIndex(ctx); err != nil {
		return err
	}
	if _, err := p.repo.CleanCache(ctx); err != nil {
		return err
	}
	files, err := p.repo.ListFiles(ctx, backend.PackFile)
	if err != nil {
		return err
	}
	p.sum.BytesAfter = 0
	for _, size := range files {
		p.sum.BytesAfter += size
	}
	return p.notRemoved()
}

// repack copies what is used of some packs, and makes sure that it can be found.
func (p *pruner) repack(ctx context.Context, x *plan) error {
	moves, meta, err := x.moves(ctx)
	if err != nil || len(moves) == 0 {
		return err
	}
	var total int64
	for _, m := range moves {
		total += m.bytes
	}
	kind := func(h repo.BlobHandle) repo.Kind {
		switch {
		case h.Type == repo.TreeBlob:
			return repo.KindTree
		case meta[h.ID]:
			return repo.KindMeta
		}
		return repo.KindData
	}
	w := p.repo.NewWriter(ctx, repo.WriterOptions{})
	defer w.Abort()
	var done atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, min(p.repo.Backend().Connections(), 2*runtime.GOMAXPROCS(0))))
	for _, m := range moves {
		g.Go(func() error {
			if err := w.CopyBlobs(gctx, m.pack, m.blobs, kind, p.RepackUncompressed); err != nil {
				return err
			}
			p.tell(PhaseRepack, done.Add(m.bytes), total)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("%w (nothing that is used was deleted)", err)
	}
	if err := w.Flush(ctx); err != nil {
		return err
	}
	_, unlisted := x.gone()
	for _, m := range moves {
		for _, b := range m.blobs {
			ok := slices.ContainsFunc(p.repo.Locations(b.Handle), func(l repo.Location) bool { return !unlisted[l.Pack] })
			if !ok {
				return fmt.Errorf("%s was packed anew and cannot be found: this is a fault of the program, nothing that is used was deleted", b.Handle)
			}
		}
	}
	return nil
}

// unchanged makes sure that nobody added a snapshot since they were read, or an
// index file, after which a snapshot comes: a program that takes no lock, or has
// lost its own, or another one's clock, may be at fault.
func (p *pruner) unchanged(ctx context.Context) error {
	now, err := p.repo.ListFiles(ctx, backend.SnapshotFile)
	if err != nil {
		return err
	}
	for id := range now {
		if p.snapshots[id] == nil && !p.Ignore[id] {
			return fmt.Errorf("%w: snapshot %s", ErrChanged, id.Str())
		}
	}
	if now, err = p.repo.ListFiles(ctx, backend.IndexFile); err != nil {
		return err
	}
	known := p.repo.IndexFiles()
	for id := range now {
		if !known[id] {
			return fmt.Errorf("%w: index %s", ErrChanged, id.Str())
		}
	}
	return nil
}

// stillUnchanged is unchanged while the index lists all that it listed.
func (p *pruner) stillUnchanged(ctx context.Context) error {
	err := p.unchanged(ctx)
	if errors.Is(err, ErrChanged) {
		return fmt.Errorf("%w; nothing that is used was deleted, run prune again", err)
	}
	return err
}

func (p *pruner) rewriteIndex(ctx context.Context, x *plan, unlisted map[repo.ID]bool) error {
	twice := map[repo.ID]bool{}
	files := map[repo.ID]bool{}
	for id, sources := range x.catalog.Sources() {
		if len(sources) > 1 {
			twice[id] = true
		}
		for _, s := range sources {
			files[s] = true
		}
	}
	if len(unlisted) == 0 && len(twice) == 0 && len(files) < smallIndexes {
		return nil
	}
	did, err := p.repo.RewriteIndex(ctx, repo.IndexRewrite{
		Drop: func(id repo.ID) bool { return unlisted[id] }, Twice: twice, BeforeRemoval: p.stillUnchanged,
		Progress: func(done, total int) { p.tell(PhaseIndex, int64(done), int64(total)) },
	})
	p.sum.IndexesWritten, p.sum.IndexesRemoved = did.Written, did.Removed
	return err
}

// removePacks deletes packs that no index lists. What cannot be deleted is a
// leftover for the next prune, which notRemoved makes an error of at the end: a pack
// that the store keeps for a while does not hold up the rest.
func (p *pruner) removePacks(ctx context.Context, ids []repo.ID) error {
	if err := p.repo.CheckLock(ctx); err != nil {
		return err
	}
	done, removed := int64(0), 0
	err := p.repo.RemoveFiles(ctx, backend.PackFile, ids, func(_ repo.ID, err error) {
		if err == nil {
			removed++
		}
		done++
		p.tell(PhaseRemove, done, int64(len(ids)))
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	p.toRemove += len(ids)
	p.stay += len(ids) - removed
	if p.stayed == nil {
		p.stayed = err
	}
	return nil
}

// notRemoved is what could not be deleted, as an error.
func (p *pruner) notRemoved() error {
	if p.stayed == nil {
		return nil
	}
	return fmt.Errorf("%d of %d packs that are not needed could not be deleted: %w (run prune again)", p.stay, p.toRemove, p.stayed)
}

func (p *pruner) tell(phase string, done, total int64) {
	if p.Progress != nil {
		p.Progress(phase, done, total)
	}
}
