// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// someLimits are real ones, or such that every layer takes many windows.
func (f *fixture) someLimits(standard limits) limits {
	if f.rnd.IntN(3) == 0 {
		return standard
	}
	return limits{segments: 2 + f.rnd.IntN(40), seams: 1 + f.rnd.IntN(4), bytes: 1 << (12 + f.rnd.IntN(10)), hold: f.rnd.IntN(1 << 18)}
}

func TestEveryLayerCountGivesTheModel(t *testing.T) {
	rounds, layers := 3, 5
	if soak() {
		rounds, layers = 40, 12
	}
	start := seed(t)
	for i := range rounds {
		t.Run(fmt.Sprintf("%d", i), func(t *testing.T) {
			size := 4<<20 + int(start%7777777)/4096*4096
			if i%2 == 1 {
				size += 1 + int(start%4095)
			}
			f := newFixture(t, start+uint64(i), size)
			f.first(1 + f.rnd.IntN(4))
			f.everyWay()
			for range layers - 1 {
				f.backup(1+f.rnd.IntN(4), f.mutate()...)
				f.everyWay()
			}
		})
	}
}

// everyWay restores the last snapshot to all kinds of targets.
func (f *fixture) everyWay() {
	f.Helper()
	s := f.snaps[len(f.snaps)-1]
	size := int64(len(s.image))

	file := f.newFile()
	f.restore(Options{Device: s.device, Target: file, Verify: true, limits: f.someLimits(restoreLimits())})
	f.same("the new file", f.content(file), s.image)

	larger := (size+511)/512*512 + 512*f.rnd.Int64N(50)
	loop := f.loop(larger)
	before := f.content(loop)
	want := append(slices.Clone(s.image), before[size:]...)
	how := []Changes{ChangesAll, ChangesCompare, ChangesAuto}[f.rnd.IntN(3)]
	f.restore(Options{Device: s.device, Target: loop, Changes: how, Force: true, Verify: true, limits: f.someLimits(restoreLimits())})
	f.same("the larger device of garbage", f.content(loop), want)

	var out bytes.Buffer
	n, err := Dump(f.Context(), f.store, &out, DumpOptions{Device: s.device, limits: f.someLimits(dumpLimits())})
	f.must(err)
	if n != size {
		f.Fatalf("the dump counted %d bytes of %d", n, size)
	}
	f.same("the dump", out.Bytes(), s.image)

	// On top of an older state of the same device.
	old := f.snaps[f.rnd.IntN(len(f.snaps))]
	f.restore(Options{Device: old.device, Target: file, Force: true, limits: f.someLimits(restoreLimits())})
	f.same("the file gone back", f.content(file), old.image)
}

func TestWindowsBeginAndEndAtWholeBlocksAndCoverEverythingOnce(t *testing.T) {
	f := newFixture(t, seed(t), 17<<20+1234) // three chunks at least
	f.fill(f.image)                          // one run, chunked: hardly a border is a block's
	s := f.backup(1, kernel.Extent{Length: int64(len(f.image))})
	c, err := openChain(t.Context(), f.store, s.device)
	f.must(err)
	for _, lim := range []limits{{1 << 20, 1, 1 << 40, 0}, {2, 1 << 20, 1 << 40, 0}, {1 << 20, 1 << 20, 300_000, 0}, {1, 1, 1, 0}} {
		pos, windows, split := int64(0), 0, 0
		seen := map[repo.ID]int{}
		b := &builder{lim: lim, size: c.size(), emit: func(w *window) error {
			windows++
			from, to := w.runs[0].Offset, w.runs[len(w.runs)-1].End()
			if from != pos || from%kernel.BlockSize != 0 || to%kernel.BlockSize != 0 && to != c.size() {
				t.Errorf("limits %+v: window %d covers %d to %d, the one before ended at %d", lim, windows, from, to, pos)
			}
			var sum int64
			for _, n := range w.needs {
				if seen[n.id]++; seen[n.id] == 2 {
					split++
				}
				for _, s := range n.segs {
					if s.at != s.off-from {
						t.Errorf("segment at %d has place %d in a window of data from %d", s.off, s.at, from)
					}
					sum += s.length
				}
			}
			if sum != to-from || sum != w.bytes {
				t.Errorf("limits %+v: window %d has %d bytes of %d", lim, windows, sum, to-from)
			}
			pos = to
			return nil
		}}
		m := c.merger()
		sel := &selector{next: func() (layer.Piece, error) { return m.Next(t.Context()) }}
		f.must(sel.each(kernel.Extent{Length: c.size()}, b.add))
		f.must(b.flush())
		if pos != c.size() {
			t.Errorf("limits %+v: the windows end at %d of %d", lim, pos, c.size())
		}
		if windows < 2 || split == 0 {
			t.Errorf("limits %+v: %d windows, %d blobs in two: nothing was cut in the middle of a blob", lim, windows, split)
		}
	}
}

func TestABlobIsFetchedOnce(t *testing.T) {
	f := newFixture(t, seed(t), 12<<20)
	f.first(1)
	for range 3 {
		f.backup(2, f.mutate()...)
	}
	s := f.snaps[len(f.snaps)-1]
	c, err := openChain(t.Context(), f.store, s.device)
	f.must(err)
	stored := map[repo.ID]int64{}
	f.must(c.walk(t.Context(), false, func(id repo.ID, _ segment) error {
		stored[id] = int64(f.repo.Locations(dataBlob(id))[0].Length)
		return nil
	}, nil))
	var want int64
	for _, n := range stored {
		want += n
	}
	if got := f.restore(Options{Device: s.device, Target: f.newFile()}).BytesFetched; got != want {
		t.Errorf("%d bytes were fetched, the blobs have %d", got, want)
	}
	if got := f.restore(Options{Device: s.device, Target: f.newFile(), limits: limits{50, 2, 1 << 20, 1 << 20}}).BytesFetched; got <= want {
		t.Errorf("with small windows %d bytes were fetched, the blobs have %d: the windows were not small", got, want)
	}
}
