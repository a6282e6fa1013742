// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// held is a device that keeps writes until it is told to let them go.
type held struct {
	mapped
	hold, release func(t testing.TB)
}

// eachHeld runs a test with a device that has taken writes and not passed them
// on (the target delay), and with one that is suspended.
func eachHeld(t *testing.T, test func(t *testing.T, h held)) {
	t.Helper()
	dmtest.Need(t)
	suspend := func(m mapped) func(t testing.TB) {
		return func(t testing.TB) {
			err := devmapper.Suspend(noContext, m.name, devmapper.SuspendOptions{NoFlush: true, SkipLockFS: true})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	resume := func(m mapped) func(t testing.TB) {
		return func(t testing.TB) {
			if err := devmapper.Resume(noContext, m.name, devmapper.ResumeOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Run("delay", func(t *testing.T) {
		d := disksBelow(t, 1, 64<<11)[0]
		m := newMapped(t, "hold", devmapper.Target{Length: 64 << 11, Type: "delay", Params: d + " 0 0 " + d + " 0 3600000"})
		release := func(t testing.TB) { // a suspension sends on what is delayed
			suspend(m)(t)
			resume(m)(t)
		}
		test(t, held{m, func(testing.TB) {}, release})
	})
	t.Run("suspended", func(t *testing.T) {
		m := newLinear(t, 64<<11)
		test(t, held{m, suspend(m), resume(m)})
	})
}

// What is written to a held device: it lies over the bounds of segments.
const heldFirst, heldBlocks = 8185, 16

func heldRange() *kernel.Bitmap {
	b := kernel.NewBitmap(16384)
	b.SetRange(heldFirst, heldFirst+heldBlocks-1)
	return b
}

// write begins to write the blocks, of which nothing is seen in sysfs.
func (h held) write(t *testing.T, tr *Tracker, f *os.File) (wait func()) {
	t.Helper()
	before := entries(t, tr)
	var done sync.WaitGroup
	done.Go(func() {
		if _, err := f.WriteAt(alignedBuffer(heldBlocks*kernel.BlockSize), heldFirst*kernel.BlockSize); err != nil {
			t.Errorf("write: %v", err)
		}
	})
	waitFor(t, "the write is in the table", func() bool { return entries(t, tr) > before })
	return done.Wait
}

func oneBlock(block int64) *kernel.Bitmap {
	b := kernel.NewBitmap(16384)
	b.Set(block)
	return b
}

func TestMappedWriteInFlightIsInEveryEpochUntilItCompletes(t *testing.T) {
	eachHeld(t, func(t *testing.T, h held) {
		tr := track(t, h.device)
		f := openDirect(t, h.device)
		h.hold(t)
		wait := h.write(t, tr, f)
		wantEqual(t, rotate(t, tr), heldRange()) // in which it was submitted
		wantEqual(t, rotate(t, tr), heldRange()) // through which it was in flight
		wantEqual(t, rotate(t, tr), heldRange())
		h.release(t)
		wait()
		wantEqual(t, rotate(t, tr), heldRange()) // in which it completed
		wantEqual(t, rotate(t, tr), kernel.NewBitmap(16384))
		wantReliable(t, tr)
		if n := entries(t, tr); n != 0 {
			t.Fatalf("%d writes are still in the table", n)
		}
	})
}

// TestMappedCompletionIsMarkedByEachCopy wipes the carried mark, so that only
// the one at completion is left, by one copy of the programs.
func TestMappedCompletionIsMarkedByEachCopy(t *testing.T) {
	eachHeld(t, func(t *testing.T, h held) {
		for _, keep := range []string{"bio_complete_0", "bio_complete_1", "bio_complete_2"} {
			t.Run(keep, func(t *testing.T) {
				tr := trackWith(t, h.device, Options{skip: func(p string) bool { return strings.HasPrefix(p, "bio_complete") && p != keep }})
				f := openDirect(t, h.device)
				h.hold(t)
				wait := h.write(t, tr, f)
				rotate(t, tr)
				if err := wipeMap(tr.bits(1)); err != nil {
					t.Fatal(err)
				}
				h.release(t)
				wait()
				wantEqual(t, rotate(t, tr), heldRange())
				wantReliable(t, tr)
			})
		}
	})
}

// TestMappedWriteFromBeforeTheStart was submitted before tracking began. While
// the device is suspended nothing can be known to have settled; what a target
// keeps is not counted by the kernel, and makes the tracker unreliable when it
// completes.
func TestMappedWriteFromBeforeTheStart(t *testing.T) {
	eachHeld(t, func(t *testing.T, h held) {
		f := openDirect(t, h.device)
		h.hold(t)
		wait := startWrite(t, f, 42)
		waitBlocked(t, 42)
		tr := trackWith(t, h.device, Options{SettleTimeout: 100 * time.Millisecond})
		all := rotate(t, tr).Count() == 16384
		h.release(t)
		wait()
		st, err := tr.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !all && (st.Reliable || !strings.Contains(st.Reason, "whose beginning was not seen")) {
			t.Fatalf("an epoch was not wholly dirty, and the tracker is reliable %v: %s", st.Reliable, st.Reason)
		}
		t.Logf("wholly dirty %v, reliable %v", all, st.Reliable)
	})
}

// waitBlocked gives a write time to get into the kernel. Of one that comes
// later tests ask less.
func waitBlocked(*testing.T, int64) { time.Sleep(500 * time.Millisecond) }

// TestMappedStrangerMakesUnreliable leaves the programs at submission out, and
// each but one at completion.
func TestMappedStrangerMakesUnreliable(t *testing.T) {
	dmtest.Need(t)
	m := newLinear(t, 64<<11)
	for keep, seen := range map[string]bool{"bio_complete_0": true, "bio_complete_1": false, "bio_complete_": true} {
		t.Run(keep, func(t *testing.T) {
			tr := trackWith(t, m.device, Options{skip: func(p string) bool {
				return strings.HasPrefix(p, "bio_queue") || strings.HasPrefix(p, "bio_complete") && !strings.HasPrefix(p, keep)
			}})
			wantReliable(t, tr)
			write(t, openDirect(t, m.device), 42)
			if !seen {
				wantReliable(t, tr) // the second copy believes that there was a first
				return
			}
			wantUnreliable(t, tr, "whose beginning was not seen")
		})
	}
}

// fillTable enters writes that are none, at addresses where there is no bio,
// until the table is full.
func fillTable(t *testing.T, tr *Tracker, since uint64) {
	t.Helper()
	for key := uint64(1); ; key++ {
		err := tr.inflightMap().Update(key, objectSpan{Start: 8, End: 16, Since: since}, ebpf.UpdateNoExist)
		if err != nil {
			if key <= uint64(tr.inflightMap().MaxEntries())/2 {
				t.Fatalf("the table of %d took %d entries: %v", tr.inflightMap().MaxEntries(), key-1, err)
			}
			return
		}
	}
}

// TestMappedTableDropsWhatHasEnded fills the table, as completions do that are
// never seen. Entries whose bios have ended make room, the one in flight stays.
func TestMappedTableDropsWhatHasEnded(t *testing.T) {
	eachHeld(t, func(t *testing.T, h held) {
		tr := track(t, h.device)
		f := openDirect(t, h.device)
		h.hold(t)
		wait := h.write(t, tr, f)
		var bio uint64
		var span objectSpan
		if !tr.inflightMap().Iterate().Next(&bio, &span) {
			t.Fatal("the write is not in the table")
		}
		span.Since = 0 // so that its age does not speak for it
		if err := tr.inflightMap().Put(bio, span); err != nil {
			t.Fatal(err)
		}
		fillTable(t, tr, 0)
		waitSecond := startWrite(t, f, 43)
		waitFor(t, "the table is swept", func() bool { return entries(t, tr) == 2 })
		if err := tr.inflightMap().Lookup(bio, &span); err != nil {
			t.Fatalf("the write in flight was dropped: %v", err)
		}
		wantReliable(t, tr)
		both := heldRange()
		both.Set(43)
		wantEqual(t, rotate(t, tr), both)
		wantEqual(t, rotate(t, tr), both)
		h.release(t)
		wait()
		waitSecond()
		wantEqual(t, rotate(t, tr), both)
		wantEqual(t, rotate(t, tr), kernel.NewBitmap(16384))
		wantReliable(t, tr)
	})
}

// TestMappedUnseenCompletionIsDropped leaves the programs at completion out: the
// entry of a write that has ended is dropped once room is needed, by its bio's
// flag, unless the bio's memory has been used again.
func TestMappedUnseenCompletionIsDropped(t *testing.T) {
	dmtest.Need(t)
	m := newLinear(t, 64<<11)
	tr := trackWith(t, m.device, Options{skip: func(p string) bool { return strings.HasPrefix(p, "bio_complete") }})
	f := openDirect(t, m.device)
	var offsets []int64
	for block := range int64(uringDepth) {
		offsets = append(offsets, block*kernel.BlockSize)
	}
	newURing(t).write(t, f, alignedBuffer(kernel.BlockSize), offsets)
	left := entries(t, tr)
	if left < uringDepth/2 {
		t.Fatalf("%d writes are in the table", left)
	}
	var keys []uint64
	var key uint64
	var span objectSpan
	for it := tr.inflightMap().Iterate(); it.Next(&key, &span); {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if err := tr.inflightMap().Put(key, objectSpan{Start: 0, End: 8}); err != nil {
			t.Fatal(err)
		}
	}
	fillTable(t, tr, 0)
	write(t, f, 100)
	if n := entries(t, tr); n > left/2+1 {
		t.Fatalf("%d entries are left of %d whose writes have ended", n, left)
	}
	wantReliable(t, tr)
}

func TestMappedTableThatIsFullMakesUnreliable(t *testing.T) {
	dmtest.Need(t)
	m := newLinear(t, 64<<11)
	tr := track(t, m.device)
	fillTable(t, tr, 1<<62) // too young to be judged
	write(t, openDirect(t, m.device), 42)
	wantUnreliable(t, tr, "more writes were in flight")
	if !mustPeek(t, tr).Get(42) {
		t.Fatal("the write is not marked")
	}
}
