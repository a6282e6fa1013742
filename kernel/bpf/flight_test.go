// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// stuckLoop is a loop device whose file lies on a file system of its own. Once
// that is frozen, what is written to the device stays in flight.
type stuckLoop struct {
	device, mount string
	frozen        bool
}

func newStuckLoop(t *testing.T, size int64) *stuckLoop {
	t.Helper()
	below, _ := newLoop(t, size+128<<20)
	s := &stuckLoop{mount: t.TempDir()}
	run(t, "mkfs.ext4", "-q", "-F", below)
	run(t, "mount", below, s.mount)
	t.Cleanup(func() { run(t, "umount", s.mount) })
	file := filepath.Join(s.mount, "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "fallocate", "-l", "64M", file)
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	s.device = attachLoop(t, file)
	t.Cleanup(func() { s.thaw(t) })
	return s
}

func (s *stuckLoop) freeze(t testing.TB) {
	t.Helper()
	run(t, "fsfreeze", "-f", s.mount)
	s.frozen = true
}

func (s *stuckLoop) thaw(t testing.TB) {
	t.Helper()
	if s.frozen {
		run(t, "fsfreeze", "-u", s.mount)
		s.frozen = false
	}
}

// inFlight reads how many writes the device's driver has.
func (s *stuckLoop) inFlight() string {
	_, writes, _ := strings.Cut(readText("/sys/block/"+filepath.Base(s.device)+"/inflight"), " ")
	return strings.TrimSpace(writes)
}

// startWrite writes a block in the background; the returned function waits for it.
func startWrite(t *testing.T, f *os.File, block int64) (wait func()) {
	var done sync.WaitGroup
	done.Go(func() {
		if _, err := f.WriteAt(alignedBuffer(kernel.BlockSize), block*kernel.BlockSize); err != nil {
			t.Errorf("write block %d: %v", block, err)
		}
	})
	return done.Wait
}

// TestWriteInFlightIsInEveryEpochUntilItCompletes holds a write in the driver
// over three rotations: it may change the device in any of those epochs.
func TestWriteInFlightIsInEveryEpochUntilItCompletes(t *testing.T) {
	s := newStuckLoop(t, 64<<20)
	tr := track(t, s.device)
	f := openDirect(t, s.device)
	none, one := kernel.NewBitmap(16384), kernel.NewBitmap(16384)
	one.Set(42)

	s.freeze(t)
	wait := startWrite(t, f, 42)
	waitFor(t, "the write is in flight", func() bool { return s.inFlight() == "1" })
	wantEqual(t, rotate(t, tr), one) // in which it was submitted
	wantEqual(t, rotate(t, tr), one) // through which it was in flight
	wantEqual(t, rotate(t, tr), one)
	s.thaw(t)
	wait()
	wantEqual(t, rotate(t, tr), one) // in which it completed
	wantEqual(t, rotate(t, tr), none)
	wantReliable(t, tr)
}

// TestCompletionIsMarkedWithoutTheTableOfWritesInFlight takes the carrying over
// away, so that only the mark at completion is left.
func TestCompletionIsMarkedWithoutTheTableOfWritesInFlight(t *testing.T) {
	s := newStuckLoop(t, 64<<20)
	tr := track(t, s.device)
	f := openDirect(t, s.device)
	s.freeze(t)
	wait := startWrite(t, f, 42)
	waitFor(t, "the write is in flight", func() bool { return s.inFlight() == "1" })
	rotate(t, tr)
	if err := wipeMap(tr.bits(1)); err != nil { // the running epoch's: wipe the carried mark
		t.Fatal(err)
	}
	s.thaw(t)
	wait()
	want := kernel.NewBitmap(16384)
	want.Set(42)
	wantEqual(t, rotate(t, tr), want)
}

// TestWriteFromBeforeTheStart is in flight when tracking starts: until it has
// completed each ended epoch counts as wholly dirty, and its completion is
// marked.
func TestWriteFromBeforeTheStart(t *testing.T) {
	s := newStuckLoop(t, 64<<20)
	f := openDirect(t, s.device)
	s.freeze(t)
	wait := startWrite(t, f, 42)
	waitFor(t, "the write is in flight", func() bool { return s.inFlight() == "1" })
	tr, err := Start(t.Context(), s.device, Options{SettleTimeout: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopIfTracked(t, s.device, tr.dir) })
	if n := rotate(t, tr).Count(); n != 16384 {
		t.Fatalf("%d blocks are dirty in an epoch that is not settled, want all", n)
	}
	s.thaw(t)
	wait()
	want := kernel.NewBitmap(16384)
	want.Set(42)
	wantEqual(t, rotate(t, tr), want)
	wantReliable(t, tr)
}

// TestStrangerMakesUnreliable is the same, of a tracker that believes to have
// settled: a write that ends without having been seen to begin.
func TestStrangerMakesUnreliable(t *testing.T) {
	s := newStuckLoop(t, 64<<20)
	f := openDirect(t, s.device)
	s.freeze(t)
	wait := startWrite(t, f, 42)
	waitFor(t, "the write is in flight", func() bool { return s.inFlight() == "1" })
	tr, err := Start(t.Context(), s.device, Options{SettleTimeout: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopIfTracked(t, s.device, tr.dir) })
	if err := tr.settledMap().Put(uint32(0), uint64(1)); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	s.thaw(t)
	wait()
	wantUnreliable(t, tr, "whose beginning was not seen")
	if !rotate(t, tr).Get(42) {
		t.Fatal("the stranger is not marked")
	}
}

// TestMergedDiscardsAreMarked submits discards at once, so that the block layer
// merges those that touch into requests of several bios, and looks at the marks
// of issue and completion alone: they walk each request's chain.
func TestMergedDiscardsAreMarked(t *testing.T) {
	if !uringDiscards(t) {
		t.Skip("this kernel has no discards by io_uring (Linux 6.12), and others are not submitted at once")
	}
	for name, keep := range map[string]string{"Issue": "rq_issue", "Completion": "rq_complete"} {
		t.Run(name, func(t *testing.T) {
			device, _ := newLoop(t, 64<<20)
			tr, err := Start(t.Context(), device, Options{skip: func(p string) bool { return !strings.HasPrefix(p, keep) }})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { stopIfTracked(t, device, tr.dir) })
			want := kernel.NewBitmap(16384)
			var ranges [][2]int64
			for i := range int64(500) {
				for _, r := range [][2]int64{{32 * i, 3}, {32*i + 3, 1}, {32*i + 4, 5}, {32*i + 16, 2}} {
					ranges = append(ranges, r)
					want.SetRange(r[0], r[0]+r[1]-1)
				}
			}
			before := discardsMerged(t, device)
			newURing(t).discard(t, openDirect(t, device), ranges)
			if keep == "rq_complete" {
				ignoreStrangers(t, tr)
			}
			wantEqual(t, rotate(t, tr), want)
			wantReliable(t, tr)
			merged := discardsMerged(t, device) - before
			t.Logf("%d of %d discards merged", merged, len(ranges))
			if merged == 0 {
				t.Fatal("no discards were merged")
			}
		})
	}
}

func discardsMerged(t *testing.T, device string) int {
	t.Helper()
	fields := strings.Fields(readText("/sys/block/" + filepath.Base(device) + "/stat"))
	n, err := strconv.Atoi(fields[12])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// ignoreStrangers clears the flags, for trackers without programs at issue.
func ignoreStrangers(t *testing.T, tr *Tracker) {
	t.Helper()
	if err := tr.raisedMap().Put(uint32(0), uint64(0)); err != nil {
		t.Fatal(err)
	}
}

// TestEachTracepointAloneMarksEverything runs with the programs of one
// tracepoint only, so that none can hide what another does not see.
func TestEachTracepointAloneMarksEverything(t *testing.T) {
	for _, keep := range []string{"bio_queue", "rq_issue", "rq_complete"} {
		for _, copy := range []string{"_0", "_1", "_2"} {
			t.Run(keep+copy, func(t *testing.T) {
				device, _ := newLoop(t, 1<<30)
				tr, err := Start(t.Context(), device, Options{skip: func(p string) bool { return p != keep+copy }})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { stopIfTracked(t, device, tr.dir) })
				want := kernel.NewBitmap(1 << 18)
				for _, op := range everyKindOfWrite {
					op.do(t, device)
					want.SetRange(op.first, op.first+op.n-1)
					wantEqual(t, mustPeek(t, tr), want)
				}
			})
		}
	}
}

func mustPeek(t *testing.T, tr *Tracker) *kernel.Bitmap {
	t.Helper()
	b, err := tr.Peek(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return b
}
