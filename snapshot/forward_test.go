// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
)

// wearing is an image of which each backup finds 64 blocks changed: the same
// but for a few, so that older blobs are worn.
type wearing struct {
	*imageFile
	rng *rand.Rand
	m   *marking
}

func newWearing(t *testing.T) *wearing {
	const size = 8 << 20
	w := &wearing{imageFile: newImage(t, size), rng: rand.New(rand.NewPCG(7, 8)), m: newMarking(size)}
	w.write(0, noise(w.rng, size))
	w.next(nil)
	return w
}

func (w *wearing) next(change func(*Options)) *Summary {
	w.t.Helper()
	return w.imageFile.backup(func(o *Options) {
		o.History = w.m
		if change != nil {
			change(o)
		}
	})
}

func (w *wearing) wear(round int64) {
	for i := range int64(64) {
		b := i * 3
		if i < 8 { // written once, and no more
			b = 1000 + 8*round + i
		}
		w.write(b*kernel.BlockSize, noise(w.rng, kernel.BlockSize))
		w.m.running.Set(b)
	}
}

// listed is how much data the snapshot needs, in bytes.
func (w *wearing) listed(id repo.ID) (n int64) {
	w.t.Helper()
	ctx := w.t.Context()
	sn, err := w.r.LoadSnapshot(ctx, id)
	if err != nil {
		w.t.Fatal(err)
	}
	seen := map[repo.ID]bool{}
	var walk func(tree repo.ID)
	walk = func(tree repo.ID) {
		t, err := w.r.LoadTree(ctx, tree)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, node := range t.Nodes {
			if node.Subtree != nil {
				walk(*node.Subtree)
				continue
			}
			for _, id := range node.Content {
				if size, ok := w.r.BlobSize(repo.BlobHandle{Type: repo.DataBlob, ID: id}); ok && node.Name == "data" && !seen[id] {
					seen[id], n = true, n+int64(size)
				}
			}
		}
	}
	walk(*sn.Tree)
	return n
}

// TestWornBlobsAreCopiedForward: what the newest snapshot needs does not grow
// with the backups before it, each copies a quarter of what changed at most, and
// all of them are right.
func TestWornBlobsAreCopiedForward(t *testing.T) {
	w := newWearing(t)
	var last *Summary
	copied := int64(0)
	for round := range int64(24) {
		w.wear(round)
		last = w.next(nil)
		copied += last.CopiedForwardBytes
		if last.CopiedForwardBytes > last.DirtyBytes/4 || (last.CopiedForwardPacked > 0) != (last.CopiedForwardBytes > 0) || last.DataAdded != last.DirtyBytes {
			t.Fatalf("round %d: %+v", round, last)
		}
		if !bytes.Equal(w.restored(last.SnapshotID), w.content()) {
			t.Fatalf("round %d: the snapshot is wrong", round)
		}
	}
	if copied == 0 {
		t.Error("nothing was copied forward")
	}
	// Of 24 times 64 blocks 56 are dead by now: 5 MiB, were they all there.
	n := w.listed(last.SnapshotID)
	t.Logf("%d bytes were copied; the last snapshot needs %d bytes of data for a device of %d", copied, n, last.DeviceSize)
	if n > last.DeviceSize*4/3 {
		t.Errorf("the last snapshot needs %d bytes of data", n)
	}
	// A compare scan finds nothing, by the sums of what was copied.
	if s := w.next(func(o *Options) { o.Changes = ChangesCompare }); s.DirtyBytes != 0 {
		t.Errorf("%+v", s)
	}
}

// letGo is an Instant after which the device is written to at once.
type letGo struct {
	Still
	after func()
}

// End implements Instant.
func (l *letGo) End() (time.Duration, error) {
	if l.after != nil {
		l.after()
		l.after = nil
	}
	return 0, nil
}

// TestWhatIsWrittenMeanwhileIsNotCopiedForward: worn blobs are read when the
// device is long in use again. What it holds by then never gets into the
// snapshot, whether all of it was written or every other block.
func TestWhatIsWrittenMeanwhileIsNotCopiedForward(t *testing.T) {
	for name, every := range map[string]int64{"All": 1, "EveryOther": 2} {
		t.Run(name, func(t *testing.T) {
			w := newWearing(t)
			copied, torn := int64(0), int64(0)
			for round := range int64(12) {
				w.wear(round)
				want := w.content()
				var o Instant = Still(PointInTimeNone)
				scramble := round%4 == 3
				if scramble {
					o = &letGo{Still(PointInTimeNone), func() {
						now := bytes.Clone(want)
						for b := int64(0); b < int64(len(now))/kernel.BlockSize; b += every {
							copy(now[b*kernel.BlockSize:], noise(w.rng, kernel.BlockSize))
							w.m.running.Set(b)
						}
						w.write(0, now)
					}}
				}
				s := w.next(func(opts *Options) { opts.Instant, opts.SpotCheck = o, 0 })
				if scramble {
					torn += s.CopiedForwardBytes
				}
				copied += s.CopiedForwardBytes
				if !bytes.Equal(w.restored(s.SnapshotID), want) {
					t.Fatalf("round %d: the snapshot is not what the device held", round)
				}
				if scramble {
					w.write(0, want)
				}
			}
			t.Logf("%d bytes were copied, %d of them while the device was written to", copied, torn)
			if every == 1 && torn != 0 || copied == torn {
				t.Errorf("%d bytes were copied, %d while everything was overwritten", copied, torn)
			}
		})
	}
}
