// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// layers are the generations of a snapshot, and the names of its layers.
func (f *imageFile) layers(id repo.ID) (*Generations, []string) {
	f.t.Helper()
	chain, manifest := f.chain(id)
	var names []string
	for _, l := range chain {
		names = append(names, fmt.Sprintf("%016x", l.Number))
	}
	return manifest.Generations, names
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

// placed says, for each block of a snapshot, the name of the layer that gives it, and the blob
// in which it lies.
func (f *imageFile) placed(id repo.ID, size int64) (layers []string, blobs []repo.ID) {
	f.t.Helper()
	ctx, store := f.t.Context(), Store{f.r}
	chain, _ := f.chain(id)
	layers, blobs = make([]string, size/kernel.BlockSize), make([]repo.ID, size/kernel.BlockSize)
	for _, l := range chain {
		for m := layer.NewMerger(store, []*layer.Layer{l}, size); ; {
			p, err := m.Next(ctx)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				f.t.Fatal(err)
			}
			for n := int64(0); n < p.Length && !p.Missing; n += kernel.BlockSize {
				i := (p.Offset + n) / kernel.BlockSize
				layers[i], blobs[i] = fmt.Sprintf("%016x", l.Number), repo.ID{}
				if !p.Zero {
					blob, _, _ := p.Part.Data.Locate(p.Data + n)
					blobs[i] = p.Part.Data.Blobs[blob]
				}
			}
		}
	}
	return layers, blobs
}

// TestScatteredBlocksLieWithOthersOfTheirAge: whether they changed or are copied forward,
// blocks of what is newer, of the older generation and of what has settled share no blob, but for
// so little as is copied here: of that both generations do. Nor does what is copied with what
// changed.
func TestScatteredBlocksLieWithOthersOfTheirAge(t *testing.T) {
	const size = 4 << 20
	rng := rand.New(rand.NewPCG(9, 9))
	f := newImage(t, size)
	f.write(0, noise(rng, size))
	last := f.backup(nil).SnapshotID
	_, was := f.placed(last, size)
	var changed, copied [3]int
	for range 60 {
		g, names := f.layers(last)
		written := map[int]bool{}
		for range 60 {
			b := rng.IntN(size / kernel.BlockSize)
			if rng.IntN(10) > 0 {
				b = b / 10 * 10
			}
			written[b] = true
			f.write(int64(b)*kernel.BlockSize, noise(rng, kernel.BlockSize))
		}
		from, _ := f.placed(last, size)
		last = f.backup(func(o *Options) { o.Changes = ChangesCompare }).SnapshotID
		_, now := f.placed(last, size)
		mates := map[repo.ID]map[int]bool{}
		for i, blob := range now {
			if blob == was[i] || blob == (repo.ID{}) {
				continue
			}
			age := 2
			if g != nil {
				older, newer := slices.Index(names, g.Older), slices.Index(names, g.Newer)
				switch at := slices.Index(names, from[i]); {
				case at == older:
					age = 1
				case at < max(older, newer) || older+newer == -2:
					age = 0
				}
			} else {
				age = 0
			}
			kind := age
			if written[i] {
				changed[age]++
			} else {
				copied[age]++
				kind = 10 + min(age, 1)
			}
			if mates[blob] == nil {
				mates[blob] = map[int]bool{}
			}
			mates[blob][kind] = true
		}
		for blob, ages := range mates {
			if len(ages) > 1 {
				t.Errorf("blob %s has blocks of several ages: %v", blob.Str(), ages)
			}
		}
		was = now
	}
	t.Logf("settled, older, newer: %d changed, %d copied forward", changed, copied)
	if slices.Contains(changed[:], 0) || copied[1] == 0 || copied[2] == 0 {
		t.Error("the load does not show all ages")
	}
}

// TestWhatHasSettledIsKnown among the newest layers of a chain.
func TestWhatHasSettledIsKnown(t *testing.T) {
	links := []link{{name: "1"}, {name: "2"}, {name: "3"}, {name: "4"}, {name: "5"}}
	for _, c := range []struct {
		gens       *Generations
		from, want int
	}{
		{&Generations{Older: "3", Newer: "4"}, 0, 2},
		{&Generations{Newer: "4"}, 0, 3},
		{&Generations{Older: "3"}, 1, 1},
		{&Generations{Older: "3", Newer: "4"}, 3, 0}, // "4" and what is newer than it
		{&Generations{Older: "3", Newer: "4"}, 4, 0}, // what is newer than both
		{&Generations{}, 0, 0},
		{nil, 0, 0},
	} {
		b := &backup{parent: &candidate{Device: Device{Manifest: &Manifest{Generations: c.gens}}}}
		if got := b.settled(links[c.from:]); got != c.want {
			t.Errorf("%+v: of the layers from %d on, %d are said to have settled, not %d", c.gens, c.from, got, c.want)
		}
	}
}
