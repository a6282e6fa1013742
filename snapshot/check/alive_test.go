// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	repocheck "github.com/dsync-backup/dsync-backup/repo/check"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// TestALostStoreIsNoDamage: what a store does not give while it gives nothing says nothing of a
// snapshot.
func TestALostStoreIsNoDamage(t *testing.T) {
	l, err := local.Open(filepath.Join(t.TempDir(), "repo"), local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	be := faulty.New(l)
	r, err := repo.Init(t.Context(), be, "password", repo.Options{KDF: repo.KDFParams{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	w := r.NewWriter(t.Context(), repo.WriterOptions{})
	tree, err := w.SaveTree(t.Context(), &repo.Tree{Nodes: []*repo.Node{}})
	if err == nil {
		err = w.Flush(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	sn := &repo.Snapshot{Time: time.Now(), Tree: &tree.ID, Paths: []string{"/dev/x"}, Tags: []string{snapshot.Tag}}
	var found []Finding
	check := func() error {
		found = nil
		_, err := Devices(t.Context(), snapshot.Store{Repository: r}, Options{
			Snapshots: map[repo.ID]*repo.Snapshot{{1}: sn}, Report: func(f Finding) { found = append(found, f) },
			Alive: func(ctx context.Context) error { return repocheck.Alive(ctx, r) },
		})
		return err
	}
	be.Inject(faulty.Rule{Ops: faulty.Load, Types: []backend.FileType{backend.PackFile}, Where: faulty.Before})
	if err := check(); err != nil || len(found) != 1 {
		t.Errorf("a tree that cannot be read: found %v, %v", found, err)
	}
	be.Kill(nil)
	if err := check(); !errors.Is(err, faulty.ErrInjected) || len(found) != 0 {
		t.Errorf("a store that is gone: found %v, %v", found, err)
	}
}
