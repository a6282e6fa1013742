// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
)

// cachedFiles are the files below a cache folder with their contents.
func cachedFiles(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		files[rel], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// counting opens a repository over a store that counts.
func counting(t testing.TB, dir, cacheDir string) (*Repository, *faulty.Backend) {
	t.Helper()
	be := faulty.New(openLocal(t, dir))
	r, err := Open(t.Context(), be, testPassword, Options{CacheDir: cacheDir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r, be
}

func loads(t testing.TB, be *faulty.Backend, do func()) int {
	t.Helper()
	before := be.Count(faulty.Load)
	do()
	return be.Count(faulty.Load) - before
}

func TestAWarmCacheAsksTheStoreForNothing(t *testing.T) {
	cacheDir := t.TempDir()
	r, dir := newRepo(t, Options{CacheDir: cacheDir})
	rng := newRand(t)
	_, content := testBackup(t, r, rng)
	meta := BlobHandle{Type: DataBlob, ID: Hash(content["dir/meta"][:100])}
	everything := func(r *Repository) {
		for range 2 { // loading again must not throw away what is in use
			if err := r.LoadIndex(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		_, s, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{})
		if err != nil {
			t.Fatal(err)
		}
		tree, err := r.LoadTree(t.Context(), *s.Tree)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.LoadTree(t.Context(), *tree.Nodes[0].Subtree); err != nil {
			t.Fatal(err)
		}
		if _, err := r.LoadBlob(t.Context(), meta, KindMeta); err != nil {
			t.Fatal(err)
		}
	}
	other := t.TempDir()
	for name, c := range map[string]struct {
		cache string
		want  []int
	}{
		"cache of the writer": {cacheDir, []int{0, 0}},
		"cold cache":          {other, []int{5, 0}}, // index, snapshot, two trees, metadata
		"no cache":            {"", []int{5, 5}},
	} {
		for round, want := range c.want {
			r, be := counting(t, dir, c.cache)
			if got := loads(t, be, func() { everything(r) }); got != want {
				t.Errorf("%s, round %d: %d loads, want %d", name, round, got, want)
			}
		}
	}
	// Bulk data is not kept.
	for name, data := range cachedFiles(t, cacheDir) {
		if len(data) > 100_000 {
			t.Errorf("%s of %d bytes is in the cache", name, len(data))
		}
	}
}

// Every file of the cache is cut, emptied, or has a byte flipped: whatever
// comes of it, what is read is right, and the cache is whole afterwards.
func TestABadCacheEntryIsDroppedAndFetchedAgain(t *testing.T) {
	cacheDir := t.TempDir()
	r, dir := newRepo(t, Options{CacheDir: cacheDir})
	rng := newRand(t)
	_, content := testBackup(t, r, rng)
	good := cachedFiles(t, cacheDir)
	if len(good) < 6 {
		t.Fatalf("%d files prove nothing", len(good))
	}
	for name, data := range good {
		if strings.HasSuffix(name, "CACHEDIR.TAG") {
			continue
		}
		for what, bad := range map[string][]byte{"cut": data[:len(data)/2], "empty": nil, "flipped": flip(data, rng.IntN(len(data))), "flipped first": flip(data, 0), "flipped third": flip(data, 3), "longer": append(bytes.Clone(data), 0)} {
			if err := os.WriteFile(filepath.Join(cacheDir, name), bad, 0o600); err != nil {
				t.Fatal(err)
			}
			r := reopen(t, dir, Options{CacheDir: cacheDir})
			_, s, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{})
			if err != nil {
				t.Fatalf("%s %s: %v", name, what, err)
			}
			got := map[string][]byte{}
			readTree(t, r, *s.Tree, "", got)
			for _, part := range [][]byte{content["dir/meta"][:100], content["dir/meta"][100:]} {
				if b, err := r.LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: Hash(part)}, KindMeta); err != nil || !bytes.Equal(b, part) {
					t.Errorf("%s %s: %v", name, what, err)
				}
			}
			for f, want := range content {
				if !bytes.Equal(got[f], want) {
					t.Errorf("%s %s: %s is wrong", name, what, f)
				}
			}
			if now := cachedFiles(t, cacheDir); !bytes.Equal(now[name], data) {
				t.Errorf("%s %s: it is not mended", name, what)
			}
		}
	}
}

func flip(data []byte, i int) []byte {
	data = bytes.Clone(data)
	data[i] ^= 1
	return data
}

// A table that goes bad while it is in use is made anew under way.
func TestATableThatGoesBadInUseIsReplaced(t *testing.T) {
	cacheDir := t.TempDir()
	r, dir := newRepo(t, Options{CacheDir: cacheDir})
	_, content := testBackup(t, r, newRand(t))
	r = reopen(t, dir, Options{CacheDir: cacheDir})
	name := onlyFile(t, filepath.Join(cacheDir, "*", "index", "*"))
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for p := int64(2); p < 4; p++ { // the pages of packs and of entries
		if _, err := f.WriteAt([]byte("bad"), p*4096+100); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if size, ok := r.BlobSize(BlobHandle{Type: DataBlob, ID: Hash(content["dir/meta"][:100])}); !ok || size != 100 {
				t.Errorf("%d, %v", size, ok)
			}
		})
	}
	wg.Wait()
}

// TestACatalogHasAllOfTheIndexOrThereIsNone: a table has gone bad, and the store does not give
// the index file that it was made from.
func TestACatalogHasAllOfTheIndexOrThereIsNone(t *testing.T) {
	cacheDir := t.TempDir()
	r, dir := newRepo(t, Options{CacheDir: cacheDir})
	testBackup(t, r, newRand(t))
	r, be := counting(t, dir, cacheDir)
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	name := onlyFile(t, filepath.Join(cacheDir, "*", "index", "*"))
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, bytes.Repeat([]byte{1}, int(info.Size())), 0o600); err != nil {
		t.Fatal(err)
	}
	be.Inject(faulty.Rule{Ops: faulty.Load, Times: 1, Where: faulty.Before})
	if c, err := r.Catalog(); !errors.Is(err, faulty.ErrInjected) {
		t.Errorf("a catalog made of a part: %v, %v", c, err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := r.Catalog()
	if err != nil || c.Len() == 0 {
		t.Fatal(c, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestNothingIsWrittenWhileTheCacheIsDeferred(t *testing.T) {
	cacheDir := t.TempDir()
	r, dir := newRepo(t, Options{CacheDir: cacheDir})
	rng := newRand(t)
	testBackup(t, r, rng)
	before := cachedFiles(t, cacheDir)
	r.DeferCache(true)
	_, content := testBackup(t, r, rng)
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, s, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.LoadTree(t.Context(), *s.Tree); err != nil {
		t.Fatal(err)
	}
	if got := cachedFiles(t, cacheDir); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("%d files instead of %d", len(got), len(before))
	}
	r.DeferCache(false)
	again, be := counting(t, dir, cacheDir)
	if n := loads(t, be, func() {
		if err := again.LoadIndex(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := again.LoadTree(t.Context(), *s.Tree); err != nil {
			t.Fatal(err)
		}
		if _, err := again.LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: Hash(content["dir/meta"][:100])}, KindMeta); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%d loads: what was held back was not all written", n)
	}
}

// Writers keep running while the cache is deferred and released.
func TestDeferringIsSafeWhileWritersRun(t *testing.T) {
	cacheDir := t.TempDir()
	r, dir := newRepo(t, Options{CacheDir: cacheDir})
	seed := newRand(t).Uint64()
	w := r.NewWriter(t.Context(), WriterOptions{})
	w.indexBlobs = 20
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() {
			for i := range uint64(100) {
				if _, err := w.SaveBlob(t.Context(), KindMeta, fmt.Append(nil, seed, g, i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 5 {
		r.DeferCache(true)
		before := len(cachedFiles(t, cacheDir))
		time.Sleep(5 * time.Millisecond) // a chance to write what must not be written
		if after := len(cachedFiles(t, cacheDir)); after != before {
			t.Errorf("%d files became %d", before, after)
		}
		r.DeferCache(false)
	}
	wg.Wait()
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := len(cachedFiles(t, cacheDir)); got < 400 {
		t.Errorf("%d files in the cache: what was held back is lost", got)
	}
	mustCheckCleanOnce(t, dir)
}

func TestARepositoryWithoutAWritableCacheWorks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, dir := newRepo(t, Options{CacheDir: filepath.Join(file, "cache")})
	testBackup(t, r, newRand(t))
	mustCheckCleanOnce(t, dir)

	// The cache goes away in the middle of a backup.
	cacheDir := filepath.Join(t.TempDir(), "cache")
	r = reopen(t, dir, Options{CacheDir: cacheDir})
	if err := os.RemoveAll(cacheDir); err != nil {
		t.Fatal(err)
	}
	_, content := testBackup(t, r, newRand(t))
	mustCheckCleanOnce(t, dir)
	mustHold(t, dir, "latest", content)
}

func TestCleaningKeepsWhatTheIndexKnows(t *testing.T) {
	cacheDir := t.TempDir()
	r, dir := newRepo(t, Options{CacheDir: cacheDir})
	rng := newRand(t)
	first, _ := testBackup(t, r, rng)
	_, content := testBackup(t, r, rng)
	if n, err := r.CleanCache(t.Context()); err != nil || n != 0 {
		t.Errorf("%d removed, %v", n, err)
	}
	stockRestics(t)[1].run(t, dir, "forget", "--prune", "--max-unused", "0", first.String())
	blobs := func() (n int) {
		for f := range cachedFiles(t, cacheDir) {
			if strings.Contains(f, "/blobs/") {
				n++
			}
		}
		return n
	}
	before := blobs()
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := before - blobs(); n != 4 { // two trees, two of metadata
		t.Errorf("after a prune by somebody else %d blobs leave the cache, want 4", n)
	}
	if n, err := r.CleanCache(t.Context()); err != nil || n != 0 {
		t.Errorf("%d removed, %v", n, err)
	}
	if n := loads(t, countLoads(t, r), func() {
		if _, err := r.LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: Hash(content["dir/meta"][:100])}, KindMeta); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Error("what is still known was removed")
	}
}

// countLoads puts a counter below a repository.
func countLoads(t testing.TB, r *Repository) *faulty.Backend {
	t.Helper()
	be := faulty.New(r.be)
	r.be = be
	return be
}
