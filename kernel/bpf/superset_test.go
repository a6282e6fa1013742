// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"encoding/binary"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

const supersetWriters = 8

// change is a write of the model: the blocks first to last changed at some time
// after `from` rotations had returned and before more than `to` had begun.
type change struct {
	first, last int64
	from, to    int64
}

// superset is the model, and what its writers share.
type superset struct {
	device string
	blocks int64
	// The blocks behind it are written through the page cache, those before it
	// past it: the kernel reports a collision of the two as an I/O error.
	pastCache int64
	fails     bool // writes may fail, and then have done anything
	alone     bool // no load elsewhere
	count     int64
	rotations int64 // 100 if 0
	patient   bool  // the device has no operations that must not wait

	discards, zeroes bool // the device does

	// disturb does something to the device while an epoch is rotated, and
	// waits for the rotation's end.
	disturb func(t *testing.T, round int64, tr *Tracker, rotate func())

	direct          *os.File
	buffered        *os.File
	began, returned atomic.Int64 // rotations
	ops             atomic.Int64
	pause           sync.RWMutex // writers hold it for reading
	stamp           atomic.Uint64

	changes [supersetWriters][]change
	epochs  []*kernel.Bitmap
	checked int // epochs, at the last look at the content
}

// envEmulated says that the machine is emulated, and too slow for the counts of a real one.
const envEmulated = "DSYNC_TEST_EMULATED"

// TestNoChangeIsMissed is the superset property: random writes of every kind
// from several writers, with heavy I/O elsewhere, while epochs are rotated. It
// holds each write against the epochs that it may belong to and, whenever the
// writers pause, the device's content against what it was at the last pause.
func TestNoChangeIsMissed(t *testing.T) {
	count := int64(50_000)
	if os.Getenv("SOAK") != "" {
		count = 200_000
	}
	blocks := int64(1 << 17) // 512 MiB
	rotations := int64(0)
	if os.Getenv(envEmulated) != "" {
		count, blocks, rotations = count/20, blocks/16, 40
	}
	device, _ := newLoop(t, blocks*kernel.BlockSize)
	(&superset{device: device, blocks: blocks, pastCache: blocks / 8 * 7, count: count, rotations: rotations}).run(t)
}

func (s *superset) run(t *testing.T) {
	s.discards, s.zeroes = supports(t, s.device, discards), supports(t, s.device, zeroes)
	count, rotations := s.count, int64(100)
	if s.rotations > 0 {
		rotations = s.rotations
	}
	tr := track(t, s.device)
	s.direct, s.buffered = openDirect(t, s.device), openDevice(t, s.device, os.O_RDWR)
	stop := func() {}
	if !s.alone {
		stop = heavyLoad(t)
	}
	rng := seed(t)

	var writers sync.WaitGroup
	defer writers.Wait() // also on the way out of a failed test
	for w := range supersetWriters {
		r := rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
		ring := newURing(t)
		ring.fails, ring.oneByOne = s.fails, s.patient
		writers.Go(func() {
			for s.ops.Add(1) <= count && !t.Failed() {
				s.changes[w] = append(s.changes[w], s.write(t, r, ring)...)
			}
		})
	}
	before := s.content(t)
	for i := range rotations {
		waitFor(t, "the writers get on", func() bool { return s.ops.Load() > i*count/rotations })
		switch {
		case i%10 >= 8: // after one epoch, and after nine
			before = s.checkpoint(t, tr, before)
		case s.disturb != nil:
			s.disturb(t, i, tr, func() { s.rotate(t, tr) })
		default:
			s.rotate(t, tr)
		}
	}
	writers.Wait()
	s.rotate(t, tr)
	stop()
	s.checkChanges(t)
	wantReliable(t, tr)
	logMisses(t, tr)
}

// checkpoint rotates while the writers pause, and looks at the content.
func (s *superset) checkpoint(t *testing.T, tr *Tracker, before []uint64) []uint64 {
	s.pause.Lock()
	defer s.pause.Unlock()
	s.rotate(t, tr)
	return s.checkContent(t, before)
}

func (s *superset) rotate(t *testing.T, tr *Tracker) {
	s.began.Add(1)
	e, err := tr.Rotate(noContext, kernel.NewNonce())
	s.returned.Add(1)
	if err == nil {
		err = tr.Ack(noContext, e.Position.Epoch)
	}
	if err != nil {
		t.Error(err)
		return
	}
	s.epochs = append(s.epochs, e.Bitmap)
}

// write makes one random change and tells the model.
func (s *superset) write(t *testing.T, r *rand.Rand, ring *uring) []change {
	s.pause.RLock()
	defer s.pause.RUnlock()
	var ranges [][2]int64 // in sectors
	one := func(maxSectors, from, to int64) (offset, length int64) {
		n := 1 + r.Int64N(maxSectors)
		at := from*8 + r.Int64N((to-from)*8-n)
		ranges = append(ranges, [2]int64{at, n})
		return at * 512, n * 512
	}
	blocks := func(maxBlocks int64) (first, n int64) {
		n = 1 + r.Int64N(maxBlocks)
		first = r.Int64N(s.pastCache - n)
		ranges = append(ranges, [2]int64{first * 8, n * 8})
		return first, n
	}
	from := s.returned.Load()
	var err error
	switch k := r.IntN(100); {
	case k < 50:
		offset, n := one(64, 0, s.pastCache)
		_, err = s.direct.WriteAt(s.fill(alignedBuffer(int(n))), offset)
	case k < 52: // long, and past the drive's cache: FUA, or a flush after it
		offset, n := one(4096, 0, s.pastCache)
		_, err = unix.Pwritev2(int(s.direct.Fd()), [][]byte{s.fill(alignedBuffer(int(n)))}, offset, unix.RWF_DSYNC)
	case k < 65 && s.pastCache < s.blocks:
		offset, n := one(64, s.pastCache, s.blocks)
		if _, err = s.buffered.WriteAt(s.fill(alignedBuffer(int(n))), offset); err == nil {
			err = unix.SyncFileRange(int(s.buffered.Fd()), offset, n, syncAll)
		}
	case k < 85:
		buf := s.fill(alignedBuffer(kernel.BlockSize))
		var offsets []int64
		for range 1 + r.IntN(16) {
			first, _ := blocks(1)
			offsets = append(offsets, first*kernel.BlockSize)
		}
		ring.write(t, s.direct, buf, offsets)
	case k < 90 && s.discards:
		first, n := blocks(256)
		err = rangeIoctl(s.direct, blkDiscard, first, n)
	case k < 94 && s.discards: // adjacent ones, which merge, and one apart
		first, n := blocks(8)
		list := [][2]int64{{first, n}}
		for range 1 + r.IntN(6) {
			first = min(first+n, s.pastCache-8)
			n = 1 + r.Int64N(8)
			list = append(list, [2]int64{first, n})
			ranges = append(ranges, [2]int64{first * 8, n * 8})
		}
		apart, n := blocks(8)
		ring.discard(t, s.direct, append(list, [2]int64{apart, n}))
	case k < 97 || !s.zeroes:
		first, n := blocks(64)
		err = rangeIoctl(s.direct, blkZeroOut, first, n)
	default:
		first, n := blocks(64)
		err = unix.Fallocate(int(s.direct.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, first*4096, n*4096)
	}
	if err != nil && !s.fails {
		t.Errorf("write %v: %v", ranges, err)
	}
	to := s.began.Load()
	var out []change
	for _, r := range ranges {
		out = append(out, change{r[0] / 8, (r[0] + r[1] - 1) / 8, from, to})
	}
	return out
}

const syncAll = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER

// fill makes each sector of a buffer unlike any that was written before.
func (s *superset) fill(b []byte) []byte {
	for i := 0; i < len(b); i += 512 {
		binary.LittleEndian.PutUint64(b[i:], s.stamp.Add(1))
	}
	return b
}

// checkChanges holds each write against the epochs that it may belong to.
func (s *superset) checkChanges(t *testing.T) {
	t.Helper()
	checked := 0
	for _, list := range s.changes {
		for _, c := range list {
			for b := c.first; b <= c.last; b++ {
				found := false
				for e := c.from; e <= c.to && !found; e++ {
					found = s.epochs[e].Get(b)
				}
				if !found {
					t.Fatalf("block %d, written in one of the epochs %d to %d, is in none", b, c.from, c.to)
				}
				checked++
			}
		}
	}
	t.Logf("%d blocks of writes checked", checked)
}

// content reads the device, which nobody writes to, and hashes each block.
func (s *superset) content(t *testing.T) []uint64 {
	t.Helper()
	out := make([]uint64, 0, s.blocks)
	buf := alignedBuffer(4 << 20)
	for offset := int64(0); offset < s.blocks*kernel.BlockSize; offset += int64(len(buf)) {
		if _, err := s.direct.ReadAt(buf, offset); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(buf); i += kernel.BlockSize {
			out = append(out, maphash.Bytes(hashSeed, buf[i:i+kernel.BlockSize]))
		}
	}
	return out
}

var hashSeed = maphash.MakeSeed()

// checkContent compares the device with what it was at the last look, and
// holds the difference against the epochs since.
func (s *superset) checkContent(t *testing.T, before []uint64) []uint64 {
	t.Helper()
	union := kernel.NewBitmap(s.epochs[0].Blocks())
	for _, e := range s.epochs[s.checked:] {
		if err := union.Or(e); err != nil {
			t.Fatal(err)
		}
	}
	now, changed := s.content(t), 0
	for i := range now {
		if now[i] == before[i] {
			continue
		}
		changed++
		if !union.Get(int64(i)) {
			t.Errorf("block %d changed in one of the epochs %d to %d, and is in none", i, s.checked, len(s.epochs)-1)
			return now
		}
	}
	t.Logf("%d epochs: %d blocks changed, %d marked", len(s.epochs)-s.checked, changed, union.Count())
	s.checked = len(s.epochs)
	return now
}

// heavyLoad writes to another loop device, and through it to the disk below,
// until it is told to stop.
func heavyLoad(t *testing.T) (stop func()) {
	t.Helper()
	device, _ := newLoop(t, 64<<20)
	f := openDirect(t, device)
	var quit atomic.Bool
	var done sync.WaitGroup
	for range 2 {
		ring := newURing(t)
		done.Go(func() {
			buf := alignedBuffer(4096)
			for !quit.Load() {
				offsets := make([]int64, uringDepth)
				for i := range offsets {
					offsets[i] = rand.Int64N(16384) * 4096
				}
				ring.write(t, f, buf, offsets)
			}
		})
	}
	stop = func() {
		quit.Store(true)
		done.Wait()
	}
	t.Cleanup(stop) // before what it writes to is taken away
	return stop
}
