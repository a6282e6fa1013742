// SPDX-License-Identifier: BSD-2-Clause

package prune

import (
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
)

func isMeta(name string) bool { return strings.HasPrefix(name, "index") }

// filled is a repository in which much can be pruned.
func filled(t testing.TB, rnd *rand.Rand) *fixture {
	f := newFixture(t, rnd)
	for range 3 {
		for range 4 + rnd.IntN(4) {
			f.snapshot()
		}
		f.duplicates()
		f.forget(2 + rnd.IntN(2))
	}
	f.leftover()
	return f
}

func TestPruneFreesWhatIsUnusedAndNothingElse(t *testing.T) {
	rnd := newRand(t)
	f := filled(t, rnd)
	cache := t.TempDir()
	for _, c := range []struct {
		name string
		opts Options
		left func(used int64) int64 // that may stay unused
	}{
		{"All", Options{}, func(int64) int64 { return 0 }},
		{"FivePercent", Options{MaxUnused: func(used int64) int64 { return used * 5 / 95 }}, func(used int64) int64 { return used * 5 / 95 }},
		{"Unlimited", Options{MaxUnused: func(int64) int64 { return math.MaxInt64 }, SmallPack: 1}, nil},
		{"Nothing", Options{MaxRepack: RepackNothing}, nil},
		{"Some", Options{MaxRepack: 1 << 20}, nil},
		{"TreesOnly", Options{RepackCacheableOnly: true}, nil},
		{"Small", Options{RepackSmall: true}, func(int64) int64 { return 0 }},
		{"Compress", Options{RepackUncompressed: true}, func(int64) int64 { return 0 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, _ := f.copied(cache)
			g.TB = t
			c.opts.IsMeta = isMeta
			dry := c.opts
			dry.DryRun = true
			said, err := Prune(t.Context(), g.repo, dry)
			g.must(err)
			if n := len(files(g, backend.PackFile)); n != len(files(f, backend.PackFile)) {
				t.Fatalf("a dry run changed the number of packs to %d", n)
			}
			sum, err := Prune(t.Context(), g.repo, c.opts)
			g.must(err)
			said.DryRun, said.DurationSeconds, said.BytesAfter = false, 0, 0
			said.IndexesWritten, said.IndexesRemoved = sum.IndexesWritten, sum.IndexesRemoved
			got := *sum
			got.DurationSeconds, got.BytesAfter = 0, 0
			if got != *said {
				t.Errorf("the dry run said\n%+v, and it did\n%+v", *said, got)
			}
			if hints := g.whole(); len(hints) > 0 {
				t.Errorf("left behind: %q", hints)
			}
			g.resticChecks()
			unused := g.unused()
			if unused != sum.UnusedAfter {
				t.Errorf("%d bytes are unused, it says %d", unused, sum.UnusedAfter)
			}
			if c.left != nil && unused > c.left(sum.Used.Bytes) {
				t.Errorf("%d bytes are unused of %d used", unused, sum.Used.Bytes)
			}
			if c.opts.MaxRepack > 0 && sum.Repacked.Bytes > c.opts.MaxRepack {
				t.Errorf("%d bytes were packed anew, more than %d", sum.Repacked.Bytes, c.opts.MaxRepack)
			}
			// Nothing is left to do.
			again, err := Prune(t.Context(), g.repo, c.opts)
			g.must(err)
			if c.opts.MaxRepack == 0 && c.left != nil && (again.PacksRepacked > 0 || again.PacksRemoved > 0) {
				t.Errorf("a second prune packs %d packs anew and removes %d", again.PacksRepacked, again.PacksRemoved)
			}
		})
	}
}

func files(f *fixture, t backend.FileType) map[repo.ID]int64 {
	f.Helper()
	list, err := f.repo.ListFiles(f.Context(), t)
	f.must(err)
	return list
}

// TestPruneThatDiesAnywhereLosesNothing lets the store die at each write and
// each removal, before it and after it, and runs prune again.
func TestPruneThatDiesAnywhereLosesNothing(t *testing.T) {
	rnd := newRand(t)
	f := filled(t, rnd)
	opts := Options{IsMeta: isMeta}
	g, be := f.copied("")
	before := be.Count(faulty.Save | faulty.Remove)
	_, err := Prune(t.Context(), g.repo, opts)
	g.must(err)
	steps := be.Count(faulty.Save|faulty.Remove) - before
	every := 1
	if os.Getenv("SOAK") != "1" {
		every = max(1, steps/12)
	}
	t.Logf("%d writes and removals, dying at every %d of them", steps, every)
	tried, late := 0, 0
	for i := rnd.IntN(every); i < steps; i += every {
		for _, where := range []faulty.Where{faulty.Before, faulty.After} {
			g, be := f.copied("")
			skip := i
			if where == faulty.After {
				// This one is done, and is the last.
				be.Inject(faulty.Rule{Ops: faulty.Save | faulty.Remove, Skip: i, Times: 1, Where: faulty.After, Err: backend.Permanent(faulty.ErrInjected)})
				skip++
			}
			be.Inject(faulty.Rule{Ops: faulty.Save | faulty.Remove, Skip: skip, Where: faulty.Before, Err: backend.Permanent(faulty.ErrInjected)})
			before := be.Count(faulty.Save | faulty.Remove)
			_, err := Prune(t.Context(), g.repo, opts)
			if calls := be.Count(faulty.Save|faulty.Remove) - before; err == nil && calls <= i {
				// Packs are filled side by side: there may be fewer than before.
				late++
				continue
			}
			if !errors.Is(err, faulty.ErrInjected) {
				t.Fatalf("step %d: the store died, and prune says %v", i, err)
			}
			g.whole()
			if tried%8 == 0 {
				g.resticChecks()
			}
			tried++
			if _, err := Prune(t.Context(), g.repo, opts); err != nil {
				t.Fatalf("step %d: run again: %v", i, err)
			}
			if hints := g.whole(); len(hints) > 0 {
				t.Errorf("step %d: left behind: %q", i, hints)
			}
			if n := g.unused(); n > 0 {
				t.Errorf("step %d: %d bytes are unused after the second run", i, n)
			}
		}
	}
	t.Logf("%d deaths, and %d that would have come after the end", tried, late)
	if late > tried/4 {
		t.Error("many a death came too late")
	}
}

// TestPruneRefusesWhenSomethingIsMissing takes away what a snapshot needs.
func TestPruneRefusesWhenSomethingIsMissing(t *testing.T) {
	rnd := newRand(t)
	f := filled(t, rnd)
	refuse := func(name, want string, harm func(g *fixture)) {
		t.Run(name, func(t *testing.T) {
			g, be := f.copied("")
			g.TB = t
			harm(g)
			g.must(g.repo.LoadIndex(t.Context()))
			before := be.Count(faulty.Save | faulty.Remove)
			_, err := Prune(t.Context(), g.repo, Options{})
			if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("prune says %v, want something with %q", err, want)
			}
			if n := be.Count(faulty.Save|faulty.Remove) - before; n != 0 {
				t.Errorf("%d files were written or removed", n)
			}
		})
	}
	// packOf is the pack of a blob that is there once and needed.
	packOf := func(g *fixture, kind repo.BlobType) repo.ID {
		for h := range g.needed() {
			if l := g.repo.Locations(h); len(l) == 1 && h.Type == kind {
				return l[0].Pack
			}
		}
		t.Fatal("no such blob")
		return repo.ID{}
	}
	remove := func(g *fixture, kind backend.FileType, id repo.ID) {
		g.must(g.repo.RemoveFiles(t.Context(), kind, []repo.ID{id}, nil))
	}
	refuse("MissingPack", "missing", func(g *fixture) { remove(g, backend.PackFile, packOf(g, repo.DataBlob)) })
	refuse("MissingTree", "", func(g *fixture) { remove(g, backend.PackFile, packOf(g, repo.TreeBlob)) })
	refuse("MissingIndex", "in no index", func(g *fixture) {
		pack := packOf(g, repo.DataBlob)
		c, err := g.repo.Catalog()
		g.must(err)
		defer c.Close()
		remove(g, backend.IndexFile, c.Sources()[pack][0])
	})
	refuse("CutPack", "not as long as the index says", func(g *fixture) {
		id := packOf(g, repo.DataBlob)
		path := g.dir + "/data/" + id.String()[:2] + "/" + id.String()
		g.must(os.Chmod(path, 0o600))
		g.must(os.Truncate(path, files(g, backend.PackFile)[id]-1))
	})
	refuse("UnreadableSnapshot", "cannot be read", func(g *fixture) {
		b := []byte("no snapshot")
		g.must(g.repo.Backend().Save(t.Context(), backend.Handle{Type: backend.SnapshotFile, Name: repo.Hash(b).String()}, b))
	})
}

// partlyUsed is a pack of which snapshots need some blobs and not others; the null ID if there is none.
func (f *fixture) partlyUsed() (pack repo.ID) {
	f.Helper()
	needed, uses := f.needed(), map[repo.ID]int{}
	f.must(f.repo.LoadIndex(f.Context()))
	f.must(f.repo.EachBlob(f.Context(), func(h repo.BlobHandle, l repo.Location) error {
		if needed[h] {
			uses[l.Pack] |= 1
		} else {
			uses[l.Pack] |= 2
		}
		return nil
	}))
	for id, u := range uses {
		if u == 3 {
			pack = id
		}
	}
	return pack
}

// TestABadBlobIsNotPackedAnew: what is moved is checked first.
func TestABadBlobIsNotPackedAnew(t *testing.T) {
	rnd := newRand(t)
	f := newFixture(t, rnd)
	// Until a pack is partly used, by what is used and what is not.
	var pack repo.ID
	for i := 0; pack.IsNull(); i++ {
		if i == 20 {
			t.Fatal("no pack is partly used")
		}
		for range 6 {
			f.snapshot()
		}
		f.forget(3)
		pack = f.partlyUsed()
	}
	g, be := f.copied("")
	// A byte of each blob in it.
	path := g.dir + "/data/" + pack.String()[:2] + "/" + pack.String()
	b, err := os.ReadFile(path)
	g.must(err)
	g.must(g.repo.EachBlob(t.Context(), func(h repo.BlobHandle, l repo.Location) error {
		if l.Pack == pack {
			b[l.Offset+l.Length/2] ^= 4
		}
		return nil
	}))
	g.must(os.Chmod(path, 0o600))
	g.must(os.WriteFile(path, b, 0o600))
	removed := be.Count(faulty.Remove)
	if _, err := Prune(t.Context(), g.repo, Options{}); !errors.Is(err, repo.ErrDamaged) {
		t.Fatalf("prune of a pack with bad blobs: %v", err)
	}
	if be.Count(faulty.Remove) != removed {
		t.Error("something was removed")
	}
}

func TestLimitsAsResticWritesThem(t *testing.T) {
	for s, want := range map[string]int64{"5%": 50, "0%": 0, "50%": 950, "0": 0, "10k": 10 << 10, "2M": 2 << 20, "7B": 7, "unlimited": math.MaxInt64} {
		fn, err := ParseMaxUnused(s)
		if err != nil || fn(950) != want {
			t.Errorf("%q: %v, want %d", s, err, want)
		}
	}
	for _, s := range []string{"", "100%", "-1%", "x", "NaN%", "-5", "9999999T", "5 %x"} {
		if _, err := ParseMaxUnused(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}
