// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

func TestDamagedParentIsPassedOver(t *testing.T) {
	f := newImage(t, 4<<20)
	f.write(0, noise(rand.New(rand.NewPCG(4, 1)), 4<<20))
	s1 := f.backup(nil)
	// What `restic repair snapshots` would leave: the layers' tree is another.
	ctx := t.Context()
	sn, _ := f.r.LoadSnapshot(ctx, s1.SnapshotID)
	w := f.r.NewWriter(ctx, repo.WriterOptions{})
	empty, err := w.SaveTree(ctx, &repo.Tree{})
	if err != nil {
		t.Fatal(err)
	}
	root := rewrite(t, f.r, w, *sn.Tree, []string{"vm", "disk"}, func(tree *repo.Tree) { tree.Find(layersFolder).Subtree = &empty.ID })
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	sn.Tree = &root
	bad, _, err := f.r.SaveSnapshot(ctx, sn)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Devices(ctx, Store{f.r}, bad, sn); !errors.Is(err, layer.ErrDamaged) {
		t.Errorf("the repaired snapshot: %v", err)
	}
	if s := f.backup(nil); s.Parent == nil || *s.Parent != s1.SnapshotID || s.DirtyBytes != 0 {
		t.Errorf("%+v", s)
	}
}

// TestAStoreThatDoesNotAnswerIsNoDamage: what cannot be had of an older snapshot may
// be there again later; a backup from scratch instead would be stored.
func TestAStoreThatDoesNotAnswerIsNoDamage(t *testing.T) {
	f := newImage(t, 4<<20)
	f.write(0, noise(rand.New(rand.NewPCG(4, 2)), 4<<20))
	s1 := f.backup(nil)
	store := faulty.New(f.r.Backend())
	r, err := repo.Open(t.Context(), store, "geheim", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.r = r
	for _, rule := range []faulty.Rule{
		{Ops: faulty.Load, Types: []backend.FileType{backend.SnapshotFile}, Where: faulty.Before},
		{Ops: faulty.Load, Types: []backend.FileType{backend.PackFile}, Times: 1, Where: faulty.Before},
		{Ops: faulty.Load, Types: []backend.FileType{backend.PackFile}, Skip: 1, Times: 1, Where: faulty.Truncate, Keep: 10},
	} {
		store.Inject(rule)
		saved := store.Count(faulty.Save)
		if s, err := f.try(nil); !errors.Is(err, faulty.ErrInjected) {
			t.Errorf("%+v: it ends with %v: %+v", rule, err, s)
		}
		if n := store.Count(faulty.Save) - saved; n != 0 {
			t.Errorf("%+v: it saves %d files", rule, n)
		}
		store.Heal()
	}
	if s := f.backup(nil); s.Parent == nil || *s.Parent != s1.SnapshotID || s.DirtyBytes != 0 {
		t.Errorf("%+v", s)
	}
}

// rewrite changes the tree at a path below a root, and the trees above.
func rewrite(t *testing.T, r *repo.Repository, w *repo.Writer, id repo.ID, path []string, change func(*repo.Tree)) repo.ID {
	t.Helper()
	tree, err := r.LoadTree(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if len(path) == 0 {
		change(tree)
	} else {
		n := tree.Find(path[0])
		sub := rewrite(t, r, w, *n.Subtree, path[1:], change)
		n.Subtree = &sub
	}
	saved, err := w.SaveTree(t.Context(), tree)
	if err != nil {
		t.Fatal(err)
	}
	return saved.ID
}
