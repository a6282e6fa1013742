// SPDX-License-Identifier: BSD-2-Clause

package moduletest

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// Each block is written with stamps that count up; a copy of the device is brought
// up to date by copying the blocks of each ended epoch while the writers go on.
// Whenever they pause, one more epoch makes the copy equal to the device: had a
// block been missed, it would hold an old stamp.
func superset(t *testing.T, d device, below string, disturb func(i int, rng *rand.Rand)) {
	const blocks, writers = 4096, 8
	pauses, turns := 2, 5
	if os.Getenv("SOAK") != "" {
		pauses, turns = 12, 20
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	f := d.open(os.O_RDWR | unix.O_DIRECT)
	beneath, err := os.OpenFile(below, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer beneath.Close()
	copied := aligned(blocks * block)
	take := func(e *kernel.Bitmap) {
		for _, r := range e.Extents(blocks * block) {
			if _, err := beneath.ReadAt(copied[r.Offset:r.End()], r.Offset); err != nil {
				t.Error(err)
			}
		}
	}
	all := kernel.NewBitmap(blocks)
	all.SetRange(0, blocks-1)
	var stamp, written atomic.Uint64
	rng := rand.New(rand.NewPCG(seed, 99))
	take(all)
	d.turn()
	for pause := range pauses {
		var stop atomic.Bool
		var wg sync.WaitGroup
		for w := range writers {
			rng := rand.New(rand.NewPCG(seed, uint64(pause*writers+w)))
			wg.Go(func() {
				b := aligned(64 * block)
				for !stop.Load() {
					// Half of the writes go to few blocks, so that marks collide.
					sectors := 1 + rng.Int64N(24)
					at := rng.Int64N(blocks*8 - sectors)
					if rng.IntN(2) == 0 {
						at = rng.Int64N(128)
					}
					for i := range sectors {
						binary.LittleEndian.PutUint64(b[i*sector:], stamp.Add(1))
					}
					switch rng.IntN(12) {
					case 0:
						_ = rangeIoctl(f, unix.BLKDISCARD, at*sector, sectors*sector)
					case 1:
						_ = rangeIoctl(f, unix.BLKZEROOUT, at*sector, sectors*sector)
					case 2:
						_ = unix.Fdatasync(int(f.Fd()))
					case 3: // FUA
						_, _ = unix.Pwritev2(int(f.Fd()), [][]byte{b[:sectors*sector]}, at*sector, unix.RWF_DSYNC)
					default:
						// It may fail where the device beneath is made to.
						_, _ = f.WriteAt(b[:sectors*sector], at*sector)
					}
					written.Add(1)
				}
			})
		}
		for i := range turns {
			for goal := written.Load() + 60; written.Load() < goal && !t.Failed(); {
				unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
			}
			if disturb != nil {
				disturb(i, rng)
			}
			take(d.rotate())
			d.ack()
		}
		stop.Store(true)
		wg.Wait()
		take(d.turn())
		before, missed := copied, 0
		copied = aligned(blocks * block)
		take(all)
		for i := range int64(blocks) {
			if string(before[i*block:(i+1)*block]) != string(copied[i*block:(i+1)*block]) {
				missed++
			}
		}
		if missed > 0 {
			t.Fatalf("pause %d: %d blocks changed and were in no epoch", pause, missed)
		}
	}
	d.want("state valid")
	t.Logf("%d writes, %s epochs", written.Load(), d.status()["epoch"])
}

func TestNoChangeIsMissed(t *testing.T) {
	need(t)
	const size = 4096 * block
	t.Run("loop", func(t *testing.T) {
		below := dmtest.Loop(t, size, dmtest.LoopOptions{})
		superset(t, newDevice(t, "super", below, size/sector), below, nil)
	})
	// Ends in interrupts.
	t.Run("virtio", func(t *testing.T) {
		disk := os.Getenv("DSYNC_TEST_DISK")
		if disk == "" {
			t.Skip("DSYNC_TEST_DISK names no disk")
		}
		superset(t, newDevice(t, "super", disk, size/sector), disk, nil)
	})
	t.Run("suspend and reload", func(t *testing.T) {
		below := dmtest.Loop(t, size, dmtest.LoopOptions{})
		d := newDevice(t, "super", below, size/sector)
		superset(t, d, below, func(i int, rng *rand.Rand) {
			if i%2 == 0 {
				d.load(line(below, 0, size/sector))
			}
			d.suspend(devmapper.SuspendOptions{NoFlush: rng.IntN(2) == 0, SkipLockFS: true})
			e := d.rotate() // while suspended
			d.resume()
			// Nobody copies this epoch: the next one takes over what it had.
			for _, r := range e.Extents(size) {
				d.tell("mark %d %d", r.Offset/sector, r.Length/sector)
			}
			d.ack()
		})
	})
	t.Run("growing", func(t *testing.T) {
		below := dmtest.Loop(t, size, dmtest.LoopOptions{})
		sectors := uint64(size / sector / 4)
		d := newDevice(t, "super", below, sectors)
		superset(t, d, below, func(int, *rand.Rand) {
			// What is behind the end cannot be written yet.
			if sectors < size/sector {
				was := d.number("blocks")
				sectors = min(sectors+size/sector/5+3, size/sector)
				d.reload(line(below, 0, sectors))
				tail := d.bitmap("active")
				for i := was; i < tail.Blocks(); i++ {
					if !tail.Get(i) {
						t.Fatalf("block %d is new, and clean", i)
					}
				}
			}
		})
		if sectors != size/sector {
			t.Errorf("grown to %d sectors only", sectors)
		}
	})
	t.Run("failing writes", func(t *testing.T) {
		loop := dmtest.Loop(t, size, dmtest.LoopOptions{})
		// Up for a second, failing writes for one.
		below := dmtest.Map(t, "flaky", devmapper.Target{Length: size / sector, Type: "flakey", Params: loop + " 0 1 1 1 error_writes"})
		superset(t, newDevice(t, "super", below, size/sector), loop, nil)
	})
}

// A write that is submitted in one epoch and ends in the next is in both.
func TestAWriteInFlightIsInBothEpochs(t *testing.T) {
	need(t)
	const size = 64 << 20
	loop := dmtest.Loop(t, size, dmtest.LoopOptions{})
	slow := dmtest.Map(t, "slow", devmapper.Target{Length: size / sector, Type: "delay", Params: loop + " 0 0 " + loop + " 0 3000"})
	d := newDevice(t, "flight", slow, size/sector)
	f := d.open(os.O_RDWR | unix.O_DIRECT)
	ended := make(chan error, 2)
	go func() { _, err := f.WriteAt(aligned(2*block), 5*block); ended <- err }()
	go func() { ended <- rangeIoctl(f, unix.BLKDISCARD, 100*block, 50*block) }()
	want := kernel.NewBitmap(size / block)
	want.SetRange(5, 6)
	want.SetRange(100, 149)
	for d.number("dirty") < want.Count() && len(ended) == 0 {
		unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
	}
	first := d.turn()
	if len(ended) > 0 {
		t.Fatal("the writes ended before the rotation: a longer delay is needed")
	}
	same(t, "the epoch of the submission", first, want)
	for range 2 {
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
	same(t, "the epoch of the end", d.turn(), want)
}

// A write that fails is marked: part of it may have reached the medium.
func TestFailedWritesAreMarked(t *testing.T) {
	need(t)
	const size = 16 << 20
	bad := dmtest.Map(t, "bad", devmapper.Target{Length: size / sector, Type: "error"})
	d := newDevice(t, "failing", bad, size/sector)
	f := d.open(os.O_RDWR | unix.O_DIRECT)
	_, err := f.WriteAt(aligned(block), 3*block)
	wantErrno(t, "write", err, unix.EIO)
	same(t, "failed write", d.turn(), blocksOf(size/block, 3))
	_, err = f.ReadAt(aligned(block), 9*block)
	wantErrno(t, "read", err, unix.EIO)
	same(t, "failed read", d.turn(), blocksOf(size/block))
	d.want("state valid")
}
