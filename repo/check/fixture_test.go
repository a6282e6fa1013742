// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

const testPassword = "correct horse"

// lossy is a store that does not give some files, or not all of them.
type lossy struct {
	backend.Backend
	mu   sync.Mutex
	lost map[backend.Handle]lost
	all  error // nothing can be had
}

// lost is the byte of a file that cannot be read; -1: nothing can be.
type lost struct {
	at  int64
	err error
}

func (b *lossy) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if err := b.fails(h, length, offset); err != nil {
		return fmt.Errorf("load %s: %w", h, err)
	}
	return b.Backend.Load(ctx, h, length, offset, fn)
}

func (b *lossy) fails(h backend.Handle, length int, offset int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	l, ok := b.lost[h]
	switch {
	case b.all != nil:
		return b.all
	case !ok || l.at >= 0 && (l.at < offset || length > 0 && l.at >= offset+int64(length)):
		return nil
	}
	return l.err
}

func (b *lossy) lose(t backend.FileType, id repo.ID, at int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost[backend.Handle{Type: t, Name: id.String()}] = lost{at, err}
}

func (b *lossy) heal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.lost)
	b.all = nil
}

// fixture is a repository with a pack of trees, and packs of data of which each
// belongs to one snapshot.
type fixture struct {
	testing.TB
	be        *lossy
	repo      *repo.Repository
	snapshots []repo.ID
	packs     []repo.ID // of data, by snapshot
	trees     repo.ID   // the pack of the last snapshot's
}

func newFixture(t testing.TB, snapshots, packSize int) *fixture {
	t.Helper()
	be, err := local.Open(filepath.Join(t.TempDir(), "repo"), local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { be.Close() })
	f := &fixture{TB: t, be: &lossy{Backend: be, lost: map[backend.Handle]lost{}}}
	f.repo, err = repo.Init(t.Context(), f.be, testPassword, repo.Options{KDF: repo.KDFParams{N: 1024, R: 8, P: 1}, Compression: repo.CompressionOff})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.repo.Close() })
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range snapshots {
		f.snapshot(rnd, packSize)
	}
	return f
}

// snapshot stores one file of four blobs, which fill a pack of their own.
func (f *fixture) snapshot(rnd *rand.Rand, packSize int) {
	f.Helper()
	w := f.repo.NewWriter(f.Context(), repo.WriterOptions{})
	n := &repo.Node{Name: "file", Type: repo.NodeFile, Content: []repo.ID{}}
	for range 4 {
		b := make([]byte, 0, packSize/4+8)
		for len(b) < packSize/4 {
			b = binary.LittleEndian.AppendUint64(b, rnd.Uint64())
		}
		s, err := w.SaveBlob(f.Context(), repo.KindData, b)
		if err != nil {
			f.Fatal(err)
		}
		n.Content = append(n.Content, s.ID)
		n.Size += uint64(len(b))
	}
	s, err := w.SaveTree(f.Context(), &repo.Tree{Nodes: []*repo.Node{n}})
	if err == nil {
		err = w.Flush(f.Context())
	}
	if err != nil {
		f.Fatal(err)
	}
	id, _, err := f.repo.SaveSnapshot(f.Context(), &repo.Snapshot{Time: time.Now(), Tree: &s.ID, Paths: []string{"/x"}, Hostname: "h"})
	if err != nil {
		f.Fatal(err)
	}
	f.snapshots = append(f.snapshots, id)
	f.packs = append(f.packs, f.repo.Locations(dataBlob(n.Content[0]))[0].Pack)
	f.trees = f.repo.Locations(treeBlob(s.ID))[0].Pack
}

// check checks everything, and says what was found and which snapshots that touches.
func (f *fixture) check(o Options) (found []string, touched []repo.ID, res *Result, err error) {
	f.Helper()
	o.Report = func(p Problem) { found = append(found, p.String()) }
	res, err = Check(f.Context(), f.repo, o)
	if err != nil {
		return found, nil, res, err
	}
	f.Cleanup(func() { res.Damage.Close() })
	all, err := res.Damage.Touched(f.Context(), res.Snapshots)
	for id := range all {
		touched = append(touched, id)
	}
	slices.Sort(found)
	return found, touched, res, err
}

// names makes sure that each finding is named once, by words that it has.
func (f *fixture) names(found []string, want ...[]string) {
	f.Helper()
	if len(found) != len(want) {
		f.Fatalf("found %q, want %q", found, want)
	}
	for _, words := range want {
		n := 0
		for _, line := range found {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				n++
			}
		}
		if n != 1 {
			f.Errorf("found %q, want one with %q", found, words)
		}
	}
}
