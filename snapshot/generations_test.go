// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
)

// layers are the generations of a snapshot, and the names of its layers.
func (f *imageFile) layers(id repo.ID) (*Generations, []string) {
	f.t.Helper()
	store := Store{f.r}
	sn, err := f.r.LoadSnapshot(f.t.Context(), id)
	if err != nil {
		f.t.Fatal(err)
	}
	devices, err := Devices(f.t.Context(), store, id, sn)
	if err != nil {
		f.t.Fatal(err)
	}
	tree, err := store.LoadTree(f.t.Context(), devices[0].Manifest.Layers)
	if err != nil {
		f.t.Fatal(err)
	}
	var names []string
	for _, n := range tree.Nodes {
		names = append(names, n.Name)
	}
	return devices[0].Manifest.Generations, names
}

// TestGenerationsComeAndGo makes backups of a device of which a tenth is written all the
// time, and which now and then grows, shrinks or is hardly written: generations end, the
// names that a snapshot has for them are those of layers in their order, and each
// snapshot restores right.
func TestGenerationsComeAndGo(t *testing.T) {
	size := int64(4 << 20)
	rng := rand.New(rand.NewPCG(8, 8))
	f := newImage(t, int(size))
	f.write(0, noise(rng, int(size)))
	f.backup(nil)
	ended := 0
	var was Generations
	for round := range 60 {
		n := 60
		switch {
		case round%9 == 8:
			n = 1
		case round%20 == 19:
			size += (rng.Int64N(128) - 64) * kernel.BlockSize
			f.resize(size)
		}
		for range n {
			b := rng.Int64N(size / kernel.BlockSize)
			if rng.IntN(10) > 0 {
				b = b / 10 * 10
			}
			f.write(b*kernel.BlockSize, noise(rng, kernel.BlockSize))
		}
		s := f.backup(func(o *Options) { o.Changes = ChangesCompare })
		g, names := f.layers(s.SnapshotID)
		if g == nil {
			t.Fatalf("round %d: no generations: %+v", round, s)
		}
		older, newer := slices.Index(names, g.Older), slices.Index(names, g.Newer)
		if g.Older != "" && older < 1 || g.Newer != "" && newer <= older || older+newer == -2 {
			t.Fatalf("round %d: %+v, and layers %q", round, *g, names)
		}
		if g.Written < was.Written {
			ended++
		}
		was = *g
		if round%5 == 4 && !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
			t.Fatalf("round %d: restored wrong", round)
		}
	}
	t.Logf("%d generations ended", ended)
	if ended < 3 {
		t.Errorf("%d generations ended", ended)
	}
}
