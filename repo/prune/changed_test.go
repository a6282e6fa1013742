// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/reindex"
)

// beside is a store beside which something else happens at a certain point.
type beside struct {
	backend.Backend

	mu         sync.Mutex
	afterList  func(backend.FileType)
	beforeSave func(backend.FileType)
	beforeRm   func(backend.FileType)
}

func (b *beside) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	err := b.Backend.List(ctx, t, fn)
	b.happen(b.afterList, t)
	return err
}

func (b *beside) Save(ctx context.Context, h backend.Handle, data []byte) error {
	b.happen(b.beforeSave, h.Type)
	return b.Backend.Save(ctx, h, data)
}

func (b *beside) Remove(ctx context.Context, h backend.Handle) error {
	b.happen(b.beforeRm, h.Type)
	return b.Backend.Remove(ctx, h)
}

func (b *beside) happen(fn func(backend.FileType), t backend.FileType) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if fn != nil {
		fn(t)
	}
}

// other is the repository as another program has it that knows of no lock.
func (f *fixture) other() *repo.Repository {
	f.Helper()
	l, err := local.Open(f.dir, local.Options{})
	f.must(err)
	f.Cleanup(func() { l.Close() })
	r, err := repo.Open(f.Context(), l, testPassword, repo.Options{PackSize: repo.MinPackSize})
	f.must(err)
	f.Cleanup(func() { r.Close() })
	f.must(r.LoadIndex(f.Context()))
	return r
}

// vanished takes away a snapshot that alone needs something, and gives what puts it back.
func (f *fixture) vanished() (back func()) {
	f.Helper()
	for _, id := range slices.SortedFunc(maps.Keys(f.needs), repo.ID.Compare) {
		needs := f.needs[id]
		delete(f.needs, id)
		left := f.needed()
		alone := 0
		for h := range needs {
			if !left[h] {
				alone++
			}
		}
		if alone < 2 { // its own root is one
			f.needs[id] = needs
			continue
		}
		path := filepath.Join(f.dir, "snapshots", id.String())
		away := filepath.Join(f.TempDir(), "away")
		f.must(os.Rename(path, away))
		return func() {
			f.must(os.Rename(away, path))
			f.needs[id] = needs
		}
	}
	f.Fatal("no snapshot alone needs anything")
	return nil
}

// TestWhatTurnsUpMeanwhileStopsAPrune: a program that takes no lock, or has lost its own, adds
// something while a prune works. Nothing that it has, or needs, is deleted.
func TestWhatTurnsUpMeanwhileStopsAPrune(t *testing.T) {
	f := filled(t, newRand(t))
	for _, c := range []struct {
		name   string
		when   func(b *beside, happens func())
		index  bool // an index file of new packs turns up, else a snapshot that needs old ones
		mended bool // by repair index, and not whole before
		says   string
	}{
		{name: "IndexBeforeThePacksAreListed", index: true, says: "run prune again", when: func(b *beside, happens func()) {
			b.afterList = func(t backend.FileType) {
				if t == backend.SnapshotFile {
					happens()
				}
			}
		}},
		{name: "SnapshotAfterThePacksAreListed", says: "run prune again", when: func(b *beside, happens func()) {
			b.afterList = func(t backend.FileType) {
				if t == backend.PackFile {
					happens()
				}
			}
		}},
		{name: "SnapshotWhileTheIndexIsWritten", says: "run prune again", when: func(b *beside, happens func()) {
			saved := 0
			b.beforeSave = func(t backend.FileType) {
				if t == backend.IndexFile {
					if saved++; saved == 2 { // the first is of what was packed anew
						happens()
					}
				}
			}
		}},
		{name: "IndexWhileTheIndexIsWritten", index: true, says: "run prune again", when: func(b *beside, happens func()) {
			saved := 0
			b.beforeSave = func(t backend.FileType) {
				if t == backend.IndexFile {
					if saved++; saved == 2 {
						happens()
					}
				}
			}
		}},
		{name: "SnapshotWhileTheOldIndexGoes", mended: true, says: "repair index", when: func(b *beside, happens func()) {
			b.beforeRm = func(t backend.FileType) {
				if t == backend.IndexFile {
					happens()
				}
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, _ := f.copied("")
			g.TB = t
			needs := maps.Clone(g.needs)
			g.needs = needs
			back := g.vanished()
			var store *beside
			g.wrap = func(be backend.Backend) backend.Backend {
				store = &beside{Backend: be}
				return store
			}
			be := g.reopen("")
			happened := false
			c.when(store, func() {
				if happened {
					return
				}
				happened = true
				if !c.index {
					back()
					return
				}
				w := g.other().NewWriter(t.Context(), repo.WriterOptions{})
				_, err := w.SaveBlob(t.Context(), repo.KindData, g.bytes(50_000))
				g.must(err)
				g.must(w.Flush(t.Context()))
			})
			before := be.Count(faulty.Remove)
			_, err := Prune(t.Context(), g.repo, Options{IsMeta: isMeta})
			if !happened || !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("it happened: %v; prune says %v", happened, err)
			}
			t.Logf("%v; %d files were removed", err, be.Count(faulty.Remove)-before)
			g.wrap = nil
			if c.mended {
				g.reopen("")
				_, err := reindex.Reindex(t.Context(), g.repo, reindex.Options{})
				g.must(err)
			}
			g.whole()
			g.resticChecks()
			if _, err := Prune(t.Context(), g.repo, Options{IsMeta: isMeta}); err != nil {
				t.Errorf("run again: %v", err)
			}
			g.whole()
		})
	}
}
