// SPDX-License-Identifier: BSD-2-Clause

package reindex

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/check"
	"github.com/dsync-backup/dsync-backup/repo/prune"
)

const testPassword = "correct horse"

// fixture is a repository of two snapshots, of which each has a pack of data and
// shares one of trees with nobody.
type fixture struct {
	testing.TB
	dir       string
	repo      *repo.Repository
	snapshots []repo.ID
	data      [][]repo.BlobLocation // of each snapshot, in the order of their offsets
	packs     []repo.ID             // of data
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{TB: t, dir: filepath.Join(t.TempDir(), "repo")}
	be, err := local.Open(f.dir, local.Options{})
	f.must(err)
	t.Cleanup(func() { be.Close() })
	f.repo, err = repo.Init(t.Context(), be, testPassword, repo.Options{KDF: repo.KDFParams{N: 1024, R: 8, P: 1}})
	f.must(err)
	t.Cleanup(func() { f.repo.Close() })
	for i := range 2 {
		f.snapshot(byte(i))
	}
	return f
}

func (f *fixture) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) snapshot(number byte) {
	f.Helper()
	w := f.repo.NewWriter(f.Context(), repo.WriterOptions{})
	n := &repo.Node{Name: "file", Type: repo.NodeFile, Content: []repo.ID{}}
	for i := range 4 {
		b := slices.Repeat([]byte{number, byte(i), 'x'}, 5000)
		s, err := w.SaveBlob(f.Context(), repo.KindData, b)
		f.must(err)
		n.Content = append(n.Content, s.ID)
		n.Size += uint64(len(b))
	}
	s, err := w.SaveTree(f.Context(), &repo.Tree{Nodes: []*repo.Node{n}})
	f.must(err)
	f.must(w.Flush(f.Context()))
	id, _, err := f.repo.SaveSnapshot(f.Context(), &repo.Snapshot{Time: time.Now(), Tree: &s.ID, Paths: []string{"/x"}, Hostname: "h"})
	f.must(err)
	f.snapshots = append(f.snapshots, id)
	var blobs []repo.BlobLocation
	var pack repo.ID
	for _, id := range n.Content {
		h := repo.BlobHandle{Type: repo.DataBlob, ID: id}
		l := f.repo.Locations(h)[0]
		pack = l.Pack
		blobs = append(blobs, repo.BlobLocation{Handle: h, Offset: l.Offset, Length: l.Length, UncompressedLength: l.UncompressedLength})
	}
	slices.SortFunc(blobs, func(a, b repo.BlobLocation) int { return int(a.Offset) - int(b.Offset) })
	f.data, f.packs = append(f.data, blobs), append(f.packs, pack)
}

// change damages a pack.
func (f *fixture) change(pack repo.ID, how func([]byte) []byte) {
	f.Helper()
	name := filepath.Join(f.dir, "data", pack.String()[:2], pack.String())
	b, err := os.ReadFile(name)
	f.must(err)
	f.must(os.Chmod(name, 0o600))
	f.must(os.WriteFile(name, how(b), 0o600))
}

func (f *fixture) reindex(o Options) (*Summary, string) {
	f.Helper()
	var said []string
	o.Say = func(line string) { said = append(said, line) }
	sum, err := Reindex(f.Context(), f.repo, o)
	f.must(err)
	return sum, strings.Join(said, "\n")
}

// gives makes sure that of a snapshot's blobs those in the list can be had, and no other
// is in the index.
func (f *fixture) gives(snapshot int, want ...int) {
	f.Helper()
	for i, b := range f.data[snapshot] {
		places := f.repo.Locations(b.Handle)
		if !slices.Contains(want, i) {
			if len(places) > 0 {
				f.Errorf("blob %d is lost, and is listed in %v", i, places)
			}
			continue
		}
		if _, err := f.repo.LoadBlob(f.Context(), b.Handle, repo.KindData); err != nil || len(places) != 1 || places[0].Pack == f.packs[snapshot] {
			f.Errorf("blob %d: %v in %v", i, err, places)
		}
	}
}

// clean has us and stock restic prune, and read everything.
func (f *fixture) clean() {
	f.Helper()
	f.restic("check")
	_, err := prune.Prune(f.Context(), f.repo, prune.Options{})
	f.must(err)
	f.restic("prune")
	f.restic("check", "--read-data")
	f.must(f.repo.LoadIndex(f.Context()))
	res, err := check.Check(f.Context(), f.repo, check.Options{ReadData: check.All(), Report: func(p check.Problem) { f.Error(p) }})
	f.must(err)
	f.must(res.Damage.Close())
}

func (f *fixture) restic(args ...string) {
	f.Helper()
	path := os.Getenv("RESTIC_018")
	if path == "" {
		path = filepath.Join("..", "..", ".build", "restic-0.18")
	}
	cmd := exec.Command(path, append([]string{"-r", f.dir, "--no-cache"}, args...)...)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+testPassword)
	if out, err := cmd.CombinedOutput(); err != nil {
		f.Fatalf("restic %s: %v\n%s", args, err, out)
	}
}

func flipHeader(b []byte) []byte {
	b[len(b)-10] ^= 1
	return b
}

func TestAPackWithABadHeaderKeepsWhatAnIndexLists(t *testing.T) {
	f := newFixture(t)
	f.change(f.packs[0], flipHeader)
	sum, said := f.reindex(Options{ReadAllPacks: true})
	if sum.BlobsKept != 4 || sum.BlobsLost != 0 || !slices.Equal(sum.PacksSalvaged, f.packs[:1]) || !slices.Equal(sum.PacksBad, f.packs[:1]) {
		t.Errorf("%+v", sum)
	}
	if !strings.Contains(said, f.packs[0].Str()) || !strings.Contains(said, "4 blobs") {
		t.Errorf("said %q", said)
	}
	f.gives(0, 0, 1, 2, 3)
	f.clean()
}

func TestABlobThatIsBadAsWellIsDropped(t *testing.T) {
	f := newFixture(t)
	f.change(f.packs[0], func(b []byte) []byte {
		b[f.data[0][1].Offset+20] ^= 1
		return flipHeader(b)
	})
	sum, _ := f.reindex(Options{ReadAllPacks: true})
	if sum.BlobsKept != 3 || sum.BlobsLost != 1 {
		t.Errorf("%+v", sum)
	}
	f.gives(0, 0, 2, 3)
	f.must(f.repo.RemoveSnapshot(t.Context(), f.snapshots[0]))
	f.clean()
}

func TestAPackThatIsCutKeepsWhatLiesBeforeTheCut(t *testing.T) {
	for _, all := range []bool{false, true} {
		f := newFixture(t)
		f.change(f.packs[1], func(b []byte) []byte { return b[:f.data[1][2].Offset+1] })
		sum, said := f.reindex(Options{ReadAllPacks: all})
		if sum.BlobsKept != 2 || sum.BlobsLost != 2 || !slices.Equal(sum.PacksSalvaged, f.packs[1:]) || sum.PacksChanged != 1 {
			t.Errorf("%+v", sum)
		}
		if !strings.Contains(said, "2 blobs") || !strings.Contains(said, "2 more are lost") {
			t.Errorf("said %q", said)
		}
		f.gives(1, 0, 1)
		f.must(f.repo.RemoveSnapshot(t.Context(), f.snapshots[1]))
		f.clean()
	}
}

// TestABadPackThatNoIndexKnowsIsLost, and nothing else is.
func TestABadPackThatNoIndexKnowsIsLost(t *testing.T) {
	f := newFixture(t)
	files, err := f.repo.ListFiles(t.Context(), backend.IndexFile)
	f.must(err)
	for id := range files {
		f.must(f.repo.Backend().Remove(t.Context(), backend.Handle{Type: backend.IndexFile, Name: id.String()}))
	}
	f.change(f.packs[0], flipHeader)
	sum, said := f.reindex(Options{})
	if sum.BlobsKept != 0 || len(sum.PacksSalvaged) != 0 || !slices.Equal(sum.PacksBad, f.packs[:1]) || !strings.Contains(said, "no index") {
		t.Errorf("%+v\n%s", sum, said)
	}
	f.gives(0)
	f.must(f.repo.RemoveSnapshot(t.Context(), f.snapshots[0]))
	f.clean()
}
