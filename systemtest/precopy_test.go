// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// inTime lets the device stand still for as long as it takes to copy the truth.
var inTime = &snapshot.Precopy{MaxFreeze: time.Minute}

// region lists blocks from to to-1.
func region(from, to int64) (out []int64) {
	for i := from; i < to; i++ {
		out = append(out, i)
	}
	return out
}

// TestABlockCopiedTwiceIsInTheLayerOnce writes between the copies and at the
// last moment, each time partly over what was copied before, and knows how much
// of it has to be read.
func TestABlockCopiedTwiceIsInTheLayerOnce(t *testing.T) {
	const size = 256<<20 + 4096
	const block = kernel.BlockSize
	c := newContent(random(t), true)
	d := newDisk(t, size)
	w := newWatched(t, d)
	f := direct(t, d.path)
	fillRange(t, f, c, 0, 256<<20) // so heavy that no newer layer is merged with it
	truth := truthFile(t)
	settled := 0
	m := &moment{
		kind: snapshot.PointInTimePrecopy,
		settles: func() {
			switch settled++; settled {
			case 2: // after the first copy: more than is held in memory
				writeBlocks(t, f, c, region(12000, 22000))
			case 3:
				writeBlocks(t, f, c, append(region(11990, 12010), 30000, 65536))
			}
		},
		begins: func() error {
			writeBlocks(t, f, c, []int64{12005, 12020, 40000})
			d.image(truth)
			return nil
		},
		ends: func() error {
			writeBlocks(t, f, c, []int64{12006, 50000}) // a matter of the next backup
			return nil
		},
	}
	full := w.mustBackup(m, inTime)
	if full.Changes != snapshot.ChangesFull || full.Rounds != 3 || full.DirtyBytes != size || full.BytesRead != 256<<20+(10000+24)*block {
		t.Errorf("a full backup: %+v", full)
	}
	w.holdsTruth(full, truth)

	writeBlocks(t, f, c, region(1000, 13000))
	settled = 0
	s := w.mustBackup(m, inTime)
	// 50000 and 12006 were left by the first backup.
	const read = (12000 + 1 + 10000 + 24) * block
	described := int64(22000-1000+1+2+1) * block
	if s.Changes != snapshot.ChangesTracker || s.Rounds != 3 || s.BytesRead != read || s.DirtyBytes != described {
		t.Errorf("an incremental backup: %+v, want %d read and %d dirty", s, read, described)
	}
	// Where the full backup was cut is up to the repository's polynomial: a blob
	// may lie so that little of it is live now, and is copied forward. Some of that
	// may be the layer's own.
	st := w.newestLayer(s.SnapshotID)
	if n := st.DataBytes + st.ZeroBytes - described; n < 0 || n > s.CopiedForwardBytes || st.Parts != 1 {
		t.Errorf("the layer describes %+v, want %d bytes and at most %d copied forward", st, described, s.CopiedForwardBytes)
	}
	w.holdsTruth(s, truth)

	// So little that it is copied once, and nothing is merged.
	settled = 3 // nothing is written before the last moment
	s = w.mustBackup(m, inTime)
	if s.Rounds != 1 || s.BytesRead != s.DirtyBytes || s.DirtyBytes != 5*block {
		t.Errorf("little: %+v", s)
	}
	w.holdsTruth(s, truth)
	w.check()
}

// TestADeviceWrittenFasterThanItIsCopiedIsNotFrozen has more written after each
// copy than can be read in the time that there is.
func TestADeviceWrittenFasterThanItIsCopiedIsNotFrozen(t *testing.T) {
	c := newContent(random(t), true)
	d := newDisk(t, 128<<20)
	w := newWatched(t, d)
	f := direct(t, d.path)
	fillRange(t, f, c, 0, 64<<20)
	truth := truthFile(t)
	still := &moment{
		kind:   snapshot.PointInTimePrecopy,
		begins: func() error { d.image(truth); return nil },
		ends:   func() error { return nil },
	}
	w.mustBackup(still, inTime)
	copies := 0
	busy := &moment{
		kind:    snapshot.PointInTimePrecopy,
		settles: func() { copies++; writeBlocks(t, f, c, region(0, 10000)) },
		begins:  func() error { t.Error("it stands still all the same"); return nil },
		ends:    func() error { return nil },
	}
	_, err := w.backup(busy, &snapshot.Precopy{MaxFreeze: time.Microsecond})
	if !errors.Is(err, snapshot.ErrTooBusy) || copies != 4 { // one more than the copies
		t.Errorf("after %d looks: %v", copies, err)
	}
	if n := len(w.files("snapshots")); n != 1 {
		t.Errorf("%d snapshots, want 1", n)
	}
	s := w.mustBackup(still, inTime)
	if s.Changes != snapshot.ChangesTracker || s.DirtyBytes != 10000*kernel.BlockSize {
		t.Errorf("the next backup: %+v", s)
	}
	w.holdsTruth(s, truth)
	w.check()
}

// TestWhatIsWrittenDuringTheCopiesIsCopiedAgain has writers on the device
// itself, with no file system to wait for, while it is copied.
func TestWhatIsWrittenDuringTheCopiesIsCopiedAgain(t *testing.T) {
	const size = 192 << 20
	r := random(t)
	d := newDisk(t, size)
	w := newWatched(t, d)
	f := direct(t, d.path)
	fillRange(t, f, newContent(r, true), 0, size/2)
	truth := truthFile(t)
	var gate sync.RWMutex // locked while the device stands still
	done := make(chan struct{})
	var writers sync.WaitGroup
	stop := sync.OnceFunc(func() {
		close(done)
		writers.Wait()
	})
	t.Cleanup(stop)
	for range 4 {
		rnd := rand.New(rand.NewPCG(r.Uint64(), 1))
		writers.Go(func() {
			if err := scribbleOn(f, rnd, size, &gate, done); err != nil {
				t.Error(err)
			}
		})
	}
	m := &moment{
		kind: snapshot.PointInTimePrecopy,
		begins: func() error {
			gate.Lock()
			d.image(truth)
			return nil
		},
		ends: func() error {
			gate.Unlock()
			return nil
		},
	}
	again := 0
	for range count(20, 4) {
		s := w.mustBackup(m, inTime)
		if s.Rounds > 1 && s.BytesRead > s.DirtyBytes {
			again++
		}
		if st := w.newestLayer(s.SnapshotID); s.MergeAddedPacked == 0 && st.DataBytes+st.ZeroBytes != s.DirtyBytes {
			t.Errorf("the layer describes %+v, and %d bytes are dirty", st, s.DirtyBytes)
		}
		w.holdsTruth(s, truth)
	}
	stop()
	if again == 0 {
		t.Error("in no backup was anything copied twice")
	}
	w.check()
}

// scribbleOn writes, discards and zeroes all over a device.
func scribbleOn(f *os.File, r *rand.Rand, size int64, gate *sync.RWMutex, stop chan struct{}) error {
	c := newContent(r, true)
	buf := device.AlignedBuffer(64 << 10)
	for {
		select {
		case <-stop:
			return nil
		case <-time.After(time.Duration(r.IntN(3)) * time.Millisecond):
		}
		n := (1 + r.Int64N(16)) * kernel.BlockSize
		off := r.Int64N((size-n)/kernel.BlockSize) * kernel.BlockSize
		c.fill(buf[:n])
		gate.RLock()
		var err error
		switch r.IntN(20) {
		case 0:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		case 1:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		default:
			_, err = f.WriteAt(buf[:n], off)
		}
		gate.RUnlock()
		if err != nil {
			return err
		}
	}
}

// TestPrecopyOfABusyFileSystemIsTheDeviceAtTheFreeze has several writers in a
// file system, each in its own way, a database, and fstrim.
func TestPrecopyOfABusyFileSystemIsTheDeviceAtTheFreeze(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			r := random(t)
			d := newDisk(t, 512<<20)
			d.mkfs(kind)
			w := newWatched(t, d)
			fillFile(t, filepath.Join(d.mnt, "old"), newContent(r, true), 40<<20)
			stop := d.writers(r)
			var u *user // it inserts ranges into files, which btrfs cannot
			if kind != "btrfs" {
				u = startUser(t, d.mnt, r.Uint64(), 20)
			}
			truth := truthFile(t)
			again := 0
			for i := range count(10, 4) {
				if i%2 == 1 {
					run(t, "fstrim", d.mnt)
				}
				durable := int64(0)
				if u != nil {
					durable = u.committed.Load()
				}
				s := w.mustBackup(d.freezing(truth), inTime)
				if s.PointInTime != string(snapshot.PointInTimePrecopy) || s.FreezeSeconds <= 0 {
					t.Errorf("point in time by %q, frozen for %v s", s.PointInTime, s.FreezeSeconds)
				}
				if s.BytesRead > s.DirtyBytes {
					again++
				}
				w.holdsTruth(s, truth)
				soundImage(t, kind, truth, durable)
			}
			stop()
			if u != nil {
				u.stop()
			}
			if again == 0 {
				t.Error("in no backup was anything copied twice")
			}
			w.check()
		})
	}
}

// writers write to a file system until they are stopped: buffered and in
// place, with O_DIRECT, appending with fsync, and with holes that come and go.
func (d *disk) writers(r *rand.Rand) (stop func()) {
	d.t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i, flags := range []int{0, unix.O_DIRECT, os.O_APPEND, 0} {
		rnd := rand.New(rand.NewPCG(r.Uint64(), uint64(i)))
		f, err := os.OpenFile(filepath.Join(d.mnt, "writer"+strconv.Itoa(i)), os.O_CREATE|os.O_RDWR|flags, 0o644)
		if err != nil {
			d.t.Fatal(err)
		}
		wg.Go(func() {
			defer f.Close()
			if err := scribbleIn(f, i, rnd, done); err != nil {
				d.t.Error(err)
			}
		})
	}
	stop = sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
	d.t.Cleanup(stop) // before the file system is unmounted
	return stop
}

func scribbleIn(f *os.File, way int, r *rand.Rand, done chan struct{}) error {
	const size = 16 << 20
	c := newContent(r, true)
	buf := device.AlignedBuffer(64 << 10)
	for {
		select {
		case <-done:
			return nil
		case <-time.After(2 * time.Millisecond):
		}
		n := (1 + r.Int64N(16)) * kernel.BlockSize
		off := r.Int64N((size-n)/kernel.BlockSize) * kernel.BlockSize
		c.fill(buf[:n])
		var err error
		switch way {
		case 2: // a log
			_, err = f.Write(buf[:n])
			if st, statErr := f.Stat(); statErr == nil && st.Size() > size {
				err = errors.Join(err, f.Truncate(0))
			}
			err = errors.Join(err, f.Sync())
		case 3:
			_, err = f.WriteAt(buf[:n], off)
			off = r.Int64N((size-n)/kernel.BlockSize) * kernel.BlockSize
			err = errors.Join(err, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n))
		default:
			_, err = f.WriteAt(buf[:n], off)
		}
		if err != nil {
			return err
		}
	}
}

// soundImage checks the file system in an image of a frozen device, and the
// database in it.
func soundImage(t testing.TB, kind, image string, durable int64) {
	t.Helper()
	if kind == "btrfs" { // its second copy could not be mounted beside the first
		run(t, "btrfs", "check", image)
		return
	}
	if kind == "ext4" {
		run(t, "e2fsck", "-fn", image) // clean even before its journal is replayed
	}
	file := filepath.Join(t.TempDir(), "copy")
	run(t, "cp", "--sparse=always", image, file)
	d := &disk{t: t, file: file, path: run(t, "losetup", "--find", "--show", file), mnt: t.TempDir()}
	defer run(t, "losetup", "-d", d.path)
	options := "rw"
	if kind == "xfs" {
		options = "rw,nouuid"
	}
	run(t, "mount", "-o", options, d.path, d.mnt)
	checkDatabase(t, d.mnt, durable)
	run(t, "umount", d.mnt)
	if kind == "xfs" {
		run(t, "xfs_repair", "-n", d.path)
	}
	if err := os.Remove(file); err != nil {
		t.Error(err)
	}
}
