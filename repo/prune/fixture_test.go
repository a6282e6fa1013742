// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/check"
)

const testPassword = "correct horse"

func newRand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// fixture is a repository and what its snapshots hold.
type fixture struct {
	testing.TB
	rnd  *rand.Rand
	dir  string
	repo *repo.Repository
	// needs are the blobs that each snapshot must give.
	needs map[repo.ID]map[repo.BlobHandle]bool
	wrap  func(backend.Backend) backend.Backend // of the store that reopen opens; nil: none
	data  []repo.ID                             // data blobs, to be shared
	sizes map[repo.ID]int
	trees []repo.ID
	below map[repo.ID]map[repo.BlobHandle]bool // what each tree needs, itself too
}

func newFixture(t testing.TB, rnd *rand.Rand) *fixture {
	f := &fixture{
		TB: t, rnd: rnd, dir: filepath.Join(t.TempDir(), "repo"), needs: map[repo.ID]map[repo.BlobHandle]bool{},
		sizes: map[repo.ID]int{}, below: map[repo.ID]map[repo.BlobHandle]bool{},
	}
	be, err := local.Open(f.dir, local.Options{})
	f.must(err)
	t.Cleanup(func() { be.Close() })
	f.repo, err = repo.Init(t.Context(), be, testPassword, repo.Options{
		KDF: repo.KDFParams{N: 1024, R: 8, P: 1}, PackSize: repo.MinPackSize, Compression: repo.CompressionFastest,
	})
	f.must(err)
	t.Cleanup(func() { f.repo.Close() })
	return f
}

func (f *fixture) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

// bytes of which some can be compressed away.
func (f *fixture) bytes(n int) []byte {
	b := make([]byte, 0, n+8)
	for len(b) < n {
		b = binary.LittleEndian.AppendUint64(b, f.rnd.Uint64()&0x00ffffffffffffff)
	}
	return b[:n]
}

// snapshot saves a snapshot of new and old files and folders.
func (f *fixture) snapshot() repo.ID {
	f.Helper()
	w := f.repo.NewWriter(f.Context(), repo.WriterOptions{})
	id, needs := f.tree(w, 2)
	f.must(w.Flush(f.Context()))
	sid, _, err := f.repo.SaveSnapshot(f.Context(), &repo.Snapshot{Time: time.Now(), Tree: &id, Paths: []string{"/x"}, Hostname: "h"})
	f.must(err)
	f.needs[sid] = needs
	return sid
}

func (f *fixture) tree(w *repo.Writer, depth int) (repo.ID, map[repo.BlobHandle]bool) {
	f.Helper()
	needs := map[repo.BlobHandle]bool{}
	t := &repo.Tree{}
	for i := range 1 + f.rnd.IntN(4) {
		n := &repo.Node{Name: fmt.Sprintf("file%d", i), Type: repo.NodeFile, Content: []repo.ID{}}
		kind := repo.KindData
		if f.rnd.IntN(3) == 0 {
			n.Name, kind = "index"+strconv.Itoa(i), repo.KindMeta
		}
		for range f.rnd.IntN(6) {
			var id repo.ID
			if len(f.data) > 0 && f.rnd.IntN(2) == 0 {
				id = f.data[f.rnd.IntN(len(f.data))]
			} else {
				b := f.bytes(1 + f.rnd.IntN(60_000))
				s, err := w.SaveBlob(f.Context(), kind, b)
				f.must(err)
				id = s.ID
				f.data = append(f.data, id)
				f.sizes[id] = len(b)
			}
			n.Content = append(n.Content, id)
			n.Size += uint64(f.sizes[id])
			needs[repo.BlobHandle{Type: repo.DataBlob, ID: id}] = true
		}
		t.Nodes = append(t.Nodes, n)
	}
	for i := range f.rnd.IntN(depth + 1) {
		var id repo.ID
		var below map[repo.BlobHandle]bool
		if len(f.trees) > 0 && f.rnd.IntN(2) == 0 {
			id = f.trees[f.rnd.IntN(len(f.trees))]
			below = f.below[id]
		} else {
			id, below = f.tree(w, depth-1)
		}
		t.Nodes = append(t.Nodes, &repo.Node{Name: fmt.Sprintf("dir%d", i), Type: repo.NodeDir, Mode: fs.ModeDir, Subtree: &id})
		maps.Copy(needs, below)
	}
	s, err := w.SaveTree(f.Context(), t)
	f.must(err)
	needs[repo.BlobHandle{Type: repo.TreeBlob, ID: s.ID}] = true
	f.trees = append(f.trees, s.ID)
	f.below[s.ID] = needs
	return s.ID, needs
}

// forget removes some snapshots.
func (f *fixture) forget(n int) {
	f.Helper()
	for _, id := range slices.SortedFunc(maps.Keys(f.needs), repo.ID.Compare)[:n] {
		f.must(f.repo.RemoveSnapshot(f.Context(), id))
		delete(f.needs, id)
	}
	// What nobody needs any more may not be shared any more.
	left := f.needed()
	f.data = slices.DeleteFunc(f.data, func(id repo.ID) bool { return !left[repo.BlobHandle{Type: repo.DataBlob, ID: id}] })
	f.trees = slices.DeleteFunc(f.trees, func(id repo.ID) bool { return !left[repo.BlobHandle{Type: repo.TreeBlob, ID: id}] })
}

func (f *fixture) needed() map[repo.BlobHandle]bool {
	out := map[repo.BlobHandle]bool{}
	for _, n := range f.needs {
		maps.Copy(out, n)
	}
	return out
}

// duplicates stores some blobs again, as two backups at the same time do.
func (f *fixture) duplicates() {
	f.Helper()
	w := f.repo.NewWriter(f.Context(), repo.WriterOptions{})
	byPack := map[repo.ID][]repo.BlobLocation{}
	f.must(f.repo.EachBlob(f.Context(), func(h repo.BlobHandle, l repo.Location) error {
		if f.rnd.IntN(5) == 0 {
			byPack[l.Pack] = append(byPack[l.Pack], repo.BlobLocation{Handle: h, Offset: l.Offset, Length: l.Length, UncompressedLength: l.UncompressedLength})
		}
		return nil
	}))
	for id, blobs := range byPack {
		f.must(w.CopyBlobs(f.Context(), id, blobs, func(h repo.BlobHandle) repo.Kind {
			if h.Type == repo.TreeBlob {
				return repo.KindTree
			}
			return repo.KindData
		}, false))
	}
	f.must(w.Flush(f.Context()))
}

// leftover saves a pack that no index lists.
func (f *fixture) leftover() {
	f.Helper()
	b := f.bytes(1000)
	f.must(f.repo.Backend().Save(f.Context(), backend.Handle{Type: backend.PackFile, Name: repo.Hash(b).String()}, b))
}

// copied is the same repository in another folder, through a store that can be
// made to fail.
func (f *fixture) copied(cacheDir string) (*fixture, *faulty.Backend) {
	f.Helper()
	dir := filepath.Join(f.TempDir(), "copy")
	if out, err := exec.Command("cp", "-a", f.dir, dir).CombinedOutput(); err != nil {
		f.Fatalf("%v: %s", err, out)
	}
	c := *f
	c.dir = dir
	be := c.reopen(cacheDir)
	return &c, be
}

// reopen opens the repository as another process would.
func (f *fixture) reopen(cacheDir string) *faulty.Backend {
	f.Helper()
	l, err := local.Open(f.dir, local.Options{})
	f.must(err)
	be := faulty.New(l)
	f.Cleanup(func() { be.Close() })
	top := backend.Backend(be)
	if f.wrap != nil {
		top = f.wrap(be)
	}
	f.repo, err = repo.Open(f.Context(), top, testPassword, repo.Options{PackSize: repo.MinPackSize, CacheDir: cacheDir})
	f.must(err)
	r := f.repo
	f.Cleanup(func() { r.Close() })
	f.must(f.repo.LoadIndex(f.Context()))
	return be
}

// whole makes sure that all that the snapshots need can be had, and nothing is
// damaged. It says what was found that is harmless.
func (f *fixture) whole() (hints []string) {
	f.Helper()
	f.reopen("")
	res, err := check.Check(context.Background(), f.repo, check.Options{ReadData: check.All(), Report: func(p check.Problem) {
		if p.Harmless {
			hints = append(hints, p.String())
		} else {
			f.Errorf("check: %s", p)
		}
	}})
	f.must(err)
	defer res.Damage.Close()
	if len(res.Snapshots) != len(f.needs) {
		f.Errorf("%d snapshots, want %d", len(res.Snapshots), len(f.needs))
	}
	for h := range f.needed() {
		if len(f.repo.Locations(h)) == 0 {
			f.Errorf("%s is lost", h)
		}
	}
	if f.Failed() {
		f.FailNow()
	}
	return hints
}

// resticChecks has stock restic read everything.
func (f *fixture) resticChecks() {
	f.Helper()
	path := os.Getenv("RESTIC_018")
	if path == "" {
		path = filepath.Join("..", "..", ".build", "restic-0.18")
	}
	cmd := exec.Command(path, "-r", f.dir, "--no-cache", "check", "--read-data")
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+testPassword)
	if out, err := cmd.CombinedOutput(); err != nil {
		f.Fatalf("restic check: %v\n%s", err, out)
	}
}

// unused adds up what no snapshot needs, and second copies.
func (f *fixture) unused() (bytes int64) {
	f.Helper()
	needed := f.needed()
	c, err := f.repo.Catalog()
	f.must(err)
	defer c.Close()
	f.must(c.EachBlob(f.Context(), func(h repo.BlobHandle, places []repo.Place) error {
		for i, p := range places {
			if i > 0 || !needed[h] {
				bytes += int64(p.Length)
			}
		}
		return nil
	}))
	return bytes
}
