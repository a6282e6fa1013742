// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// An hourly backup leaves thousands of index files: lookups go through a few
// tables all the same, also after restic has replaced all of the files.
func TestManyIndexFilesAreLookedUpInFewTables(t *testing.T) {
	for _, cacheDir := range []string{"", t.TempDir()} {
		r, dir := newRepo(t, Options{CacheDir: cacheDir})
		const n = 150
		save := func(i int) BlobHandle {
			w := r.NewWriter(t.Context(), WriterOptions{})
			s, err := w.SaveBlob(t.Context(), KindData, fmt.Append(nil, "blob ", i))
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			return BlobHandle{Type: DataBlob, ID: s.ID}
		}
		var handles []BlobHandle
		for i := range n {
			handles = append(handles, save(i))
		}
		check := func(r *Repository) {
			t.Helper()
			for _, h := range handles {
				if got := len(r.Locations(h)); got != 1 {
					t.Fatalf("%s is at %d places", h, got)
				}
			}
			if got := len(r.tables.list()); got > 2*maxTables {
				t.Errorf("%d tables are open", got)
			}
		}
		check(r)
		for want := range 2 {
			again, be := counting(t, dir, cacheDir)
			got := loads(t, be, func() {
				if err := again.LoadIndex(t.Context()); err != nil {
					t.Fatal(err)
				}
			})
			if cacheDir != "" && got != 0 || cacheDir == "" && got != n {
				t.Errorf("round %d: %d index files were read", want, got)
			}
			check(again)
			if got := len(again.tables.list()); got > maxTables {
				t.Errorf("%d tables are open after loading", got)
			}
		}
		// Half of the index files go; what they listed counts no more, although
		// it is in a merged table.
		files, err := listIDs(t.Context(), r.be, backend.IndexFile)
		if err != nil {
			t.Fatal(err)
		}
		gone := map[BlobHandle]bool{}
		packs := indexFiles(t, r)
		for _, f := range files[:n/2] {
			if err := r.be.Remove(t.Context(), backend.Handle{Type: backend.IndexFile, Name: f.id.String()}); err != nil {
				t.Fatal(err)
			}
			gone[packs[f.id][0].Blobs[0].Handle] = true
		}
		for _, r := range []*Repository{r, reopen(t, dir, Options{CacheDir: cacheDir})} {
			if err := r.LoadIndex(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, h := range handles {
				if r.Has(h) == gone[h] {
					t.Errorf("%s: known is %v", h, r.Has(h))
				}
			}
		}
		// restic makes one new index file of all packs.
		stockRestics(t)[1].run(t, dir, "repair", "index", "--read-all-packs")
		again, be := counting(t, dir, cacheDir)
		if got := loads(t, be, func() {
			if err := again.LoadIndex(t.Context()); err != nil {
				t.Fatal(err)
			}
		}); got != 1 {
			t.Errorf("%d index files were read, want 1", got)
		}
		check(again)
		if cacheDir != "" {
			if names, err := filepath.Glob(filepath.Join(cacheDir, "*", "index", "*")); err != nil || len(names) != 1 {
				t.Errorf("%d tables are left in the cache, %v", len(names), err)
			}
		}
	}
}
