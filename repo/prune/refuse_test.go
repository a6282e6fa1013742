// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
)

// TestATreeThatTheCatalogListsIsNeverTakenForEmpty: the tables of the cache go bad after the
// catalog was made of them, and the store does not give the index again.
func TestATreeThatTheCatalogListsIsNeverTakenForEmpty(t *testing.T) {
	f := filled(t, newRand(t))
	cache := t.TempDir()
	g, be := f.copied(cache)
	tables, err := filepath.Glob(filepath.Join(cache, "*", "index", "*"))
	if err != nil || len(tables) == 0 {
		t.Fatalf("%d tables in the cache: %v", len(tables), err)
	}
	before := be.Count(faulty.Save | faulty.Remove)
	_, err = Prune(t.Context(), g.repo, Options{Progress: func(phase string, done, _ int64) {
		if phase != PhaseMark || done != 0 {
			return
		}
		for _, name := range tables {
			fi, err := os.Stat(name)
			g.must(err)
			g.must(os.WriteFile(name, bytes.Repeat([]byte{1}, int(fi.Size())), 0o600))
		}
		be.Inject(faulty.Rule{Ops: faulty.Load, Types: []backend.FileType{backend.IndexFile}, Where: faulty.Before, Err: backend.Permanent(faulty.ErrInjected)})
	}})
	if err == nil || !strings.Contains(err.Error(), "nothing was deleted") || strings.Contains(err.Error(), "\n") {
		t.Errorf("prune says %v", err)
	}
	if n := be.Count(faulty.Save|faulty.Remove) - before; n != 0 {
		t.Errorf("%d files were written or removed", n)
	}
	g.whole()
}

// TestALeftoverThatCannotBeDeletedDoesNotBlockAPrune: a store may keep files for a while,
// whoever wants to delete them. What else there is to do is done.
func TestALeftoverThatCannotBeDeletedDoesNotBlockAPrune(t *testing.T) {
	f := filled(t, newRand(t))
	g, _ := f.copied("")
	left := repo.Hash([]byte("left"))
	g.must(g.repo.Backend().Save(t.Context(), backend.Handle{Type: backend.PackFile, Name: left.String()}, []byte("left")))
	g.wrap = func(be backend.Backend) backend.Backend { return &retained{be, left.String()} }
	g.reopen("")
	_, err := Prune(t.Context(), g.repo, Options{IsMeta: isMeta})
	if !errors.Is(err, errRetained) || !strings.Contains(err.Error(), "1 of ") || strings.Contains(err.Error(), "\n") {
		t.Errorf("prune says %v", err)
	}
	if n := g.unused(); n > 0 {
		t.Errorf("%d bytes are unused", n)
	}
	hints := g.whole()
	if _, ok := files(g, backend.PackFile)[left]; !ok || len(hints) != 1 {
		t.Errorf("the leftover is there: %v; hints: %q", ok, hints)
	}
}

var errRetained = backend.Permanent(errors.New("the object is locked until next year"))

// retained is a store that does not delete one pack.
type retained struct {
	backend.Backend
	name string
}

func (r *retained) Remove(ctx context.Context, h backend.Handle) error {
	if h.Type == backend.PackFile && h.Name == r.name {
		return errRetained
	}
	return r.Backend.Remove(ctx, h)
}

// TestWhatIsMissingIsCountedOnce: however many trees name it.
func TestWhatIsMissingIsCountedOnce(t *testing.T) {
	f := newFixture(t, newRand(t))
	blobs := f.repo.NewWriter(t.Context(), repo.WriterOptions{})
	lost, err := blobs.SaveBlob(t.Context(), repo.KindData, []byte("lost"))
	f.must(err)
	f.must(blobs.Flush(t.Context()))
	index := files(f, backend.IndexFile)
	w := f.repo.NewWriter(t.Context(), repo.WriterOptions{})
	for _, name := range []string{"a", "b", "c"} {
		s, err := w.SaveTree(t.Context(), &repo.Tree{Nodes: []*repo.Node{
			{Name: name, Type: repo.NodeFile, Content: []repo.ID{lost.ID, lost.ID}, Size: 8},
		}})
		f.must(err)
		f.must(w.Flush(t.Context()))
		_, _, err = f.repo.SaveSnapshot(t.Context(), &repo.Snapshot{Time: time.Now(), Tree: &s.ID, Paths: []string{"/x"}})
		f.must(err)
	}
	for id := range index {
		f.must(f.repo.RemoveFiles(t.Context(), backend.IndexFile, []repo.ID{id}, nil))
	}
	f.must(f.repo.LoadIndex(t.Context()))
	_, err = Prune(t.Context(), f.repo, Options{})
	if !errors.Is(err, ErrIncomplete) || !strings.Contains(err.Error(), "1 blobs are in no index") {
		t.Errorf("prune says %v", err)
	}
}
