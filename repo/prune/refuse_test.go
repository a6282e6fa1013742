// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
