// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
)

// TestChainsStayShort makes many backups of a skewed load: every snapshot
// restores right, no chain is longer than 16 layers, and merging stays cheap.
func TestChainsStayShort(t *testing.T) {
	const size = 16 << 20
	rng := rand.New(rand.NewPCG(5, 6))
	f := newImage(t, size)
	f.write(0, noise(rng, size))
	m := newMarking(size)
	with := func(o *Options) { o.History = m }
	type kept struct {
		id   repo.ID
		want []byte
	}
	keep := []kept{{f.backup(with).SnapshotID, f.content()}}
	longest, merged, data := 0, int64(0), int64(0)
	for n := range 100 {
		for range 1 + rng.IntN(100) {
			b := rng.Int64N(size / kernel.BlockSize)
			if rng.IntN(3) > 0 {
				b %= size / kernel.BlockSize / 10
			}
			content := noise(rng, kernel.BlockSize)
			if rng.IntN(5) == 0 {
				clear(content)
			}
			f.write(b*kernel.BlockSize, content)
			m.running.Set(b)
		}
		s := f.backup(with)
		longest, merged, data = max(longest, s.Layers), merged+s.MergeAddedPacked, data+s.DataAddedPacked
		if s.Changes != ChangesTracker || s.MetadataAddedPacked <= 0 {
			t.Fatalf("%+v", s)
		}
		if n%7 == 0 {
			keep = append(keep, kept{s.SnapshotID, f.content()})
		}
	}
	if longest > 12 || longest < 3 {
		t.Errorf("the longest chain has %d layers", longest)
	}
	if merged == 0 || merged > data*8/100 {
		t.Errorf("merging stored %d bytes for %d of data", merged, data)
	}
	t.Logf("longest chain %d layers; merging stored %.1f %% of the data", longest, float64(merged)/float64(data)*100)
	// Forgetting any of them does not harm the others, and none was changed.
	for i, k := range keep {
		if i%3 == 1 {
			if err := f.r.RemoveSnapshot(t.Context(), k.id); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if !bytes.Equal(f.restored(k.id), k.want) {
			t.Fatalf("snapshot %d of %d is wrong", i, len(keep))
		}
	}
	// A compare scan finds nothing to do, by the merged sums.
	if s := f.backup(func(o *Options) { o.Changes = ChangesCompare }); s.DirtyBytes != 0 || s.Changes != ChangesCompare {
		t.Errorf("%+v", s)
	}
}

// weights is a chain whose merges are only written down. Layers are called by
// their weight.
type weights struct {
	ids   map[repo.ID]int64
	links []link
	cost  int64
}

func (w *weights) add(n int64) {
	id := repo.Hash(fmt.Append(nil, len(w.ids)))
	w.ids[id] = n
	w.links = append(w.links, link{fmt.Sprint(len(w.ids)), id})
}

func (w *weights) LoadTree(_ context.Context, id repo.ID) (*repo.Tree, error) {
	if _, ok := w.ids[id]; ok {
		part := repo.Hash(id[:])
		return &repo.Tree{Nodes: []*repo.Node{{Subtree: &part}}}, nil
	}
	for layer, n := range w.ids {
		if repo.Hash(layer[:]) == id {
			return &repo.Tree{Nodes: []*repo.Node{{Name: "index", Size: uint64(n)}}}, nil
		}
	}
	return nil, fmt.Errorf("no tree %v", id)
}

func (w *weights) LoadMeta(context.Context, repo.ID) ([]byte, error) { return nil, nil }

func (w *weights) BlobSize(repo.BlobHandle) (int, bool) { return 0, false }

func (w *weights) merge(_ context.Context, links []link, left bool) (*repo.ID, int64, error) {
	if left { // nothing is overridden
		links = links[:1]
	}
	var sum int64
	for _, l := range links {
		sum += w.ids[l.tree]
	}
	id := repo.Hash(fmt.Append(nil, "merged", len(w.ids)))
	w.ids[id], w.cost = sum, w.cost+sum
	return &id, sum, nil
}

// TestMergesAreLogarithmic adds layers of many patterns of weights, shrinking
// ones among them, which never look ripe for a merge.
func TestMergesAreLogarithmic(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	for name, next := range map[string]func(i int) int64{
		"Equal":     func(int) int64 { return 100 },
		"Shrinking": func(i int) int64 { return int64(1e6 / (i + 1)) },
		"Halving":   func(i int) int64 { return 1<<40>>min(i, 40) + 1 },
		"Growing":   func(i int) int64 { return int64(i + 1) },
		"Random":    func(int) int64 { return 1 + rng.Int64N(1000) },
		"Skewed":    func(int) int64 { return 1 << rng.IntN(30) },
	} {
		t.Run(name, func(t *testing.T) {
			w := &weights{ids: map[repo.ID]int64{}}
			w.add(1)
			var total int64
			var gens Generations
			for i := range 300 {
				n := next(i)
				total += n
				w.add(n)
				c := &generational{chain: &chain{from: w, links: slices.Clone(w.links), merge: w.merge}, gens: gens, size: 1e6, own: n}
				if err := c.shorten(t.Context()); err != nil {
					t.Fatal(err)
				}
				gens = c.gens
				if w.links = c.links; len(w.links) > maxLayers {
					t.Fatalf("%d layers", len(w.links))
				}
				var sum int64
				for _, l := range w.links {
					sum += w.ids[l.tree]
				}
				if sum != total+1 {
					t.Fatalf("after %d: the layers weigh %d, not %d", i, sum, total+1)
				}
			}
			if per := float64(w.cost) / float64(total+1); per > 14 {
				t.Errorf("each was merged %.1f times", per)
			} else {
				t.Logf("each was merged %.1f times", per)
			}
		})
	}
}
