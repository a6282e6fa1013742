// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

const mib = 1 << 20

func TestMain(m *testing.M) {
	if IsWatchdog() {
		os.Exit(WatchdogMain())
	}
	if len(os.Args) == 3 && os.Args[1] == victimArg {
		os.Exit(victim(os.Args[2]))
	}
	os.Exit(looptest.Main(m))
}

// long is more than any test takes: a freeze that ends by its deadline in a
// test that expects another end shows as ErrTooLong.
const long = 4 * time.Minute

// patience is what a test waits for what must happen soon, on a machine
// however busy.
const patience = time.Minute

func fileSystem(t *testing.T, fsType string) (dev, dir string) {
	t.Helper()
	dev = looptest.Device(t, looptest.MinSize)
	looptest.Mkfs(t, fsType, dev)
	return dev, looptest.Mount(t, dev)
}

func start(t *testing.T, dev string, o Options) *Freezer {
	t.Helper()
	mounts, err := device.Mounts(dev)
	if err != nil || len(mounts) == 0 {
		t.Fatalf("mounts of %s: %v (%v)", dev, mounts, err)
	}
	f, err := Start(t.Context(), mounts, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// writer writes to a file system without end; a frozen one stops it.
type writer struct {
	count atomic.Int64
	stop  atomic.Bool
	done  chan error
}

func startWriter(t *testing.T, dir string) *writer {
	t.Helper()
	w := &writer{done: make(chan error, 1)}
	f, err := os.Create(filepath.Join(dir, "writer"))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer f.Close()
		for !w.stop.Load() {
			n := w.count.Load()
			if _, err := f.WriteAt([]byte(strconv.FormatInt(n, 10)), n%1000*4096); err != nil {
				w.done <- err
				return
			}
			w.count.Add(1)
		}
		w.done <- nil
	}()
	t.Cleanup(func() {
		w.stop.Store(true)
		if err := <-w.done; err != nil {
			t.Error(err)
		}
	})
	w.goesOn(t)
	return w
}

// goesOn waits until the writer has written more.
func (w *writer) goesOn(t *testing.T) {
	t.Helper()
	giveUp := time.Now().Add(patience)
	for n := w.count.Load(); w.count.Load() < n+3; time.Sleep(time.Millisecond) {
		if time.Now().After(giveUp) {
			looptest.ThawAll()
			t.Fatal("the writer is stopped: the file system is frozen")
		}
		select {
		case err := <-w.done:
			t.Fatalf("writer: %v", err)
		default:
		}
	}
}

// stands still: at most the write that was under way comes through.
func (w *writer) standsStill(t *testing.T) {
	t.Helper()
	n := w.count.Load()
	time.Sleep(100 * time.Millisecond)
	if m := w.count.Load(); m > n+1 {
		t.Fatalf("%d writes went through a freeze", m-n)
	}
}

// writable proves that the file systems are thawed.
func writable(t *testing.T, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		if isFrozen(t, dir) {
			t.Fatalf("%s is frozen", dir)
		}
		if err := os.WriteFile(filepath.Join(dir, "proof"), []byte("written"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// isFrozen asks without waiting for it: freezing a frozen file system is EBUSY.
func isFrozen(t *testing.T, dir string) bool {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	switch err := freezeFS(f); {
	case err == nil:
		if err := thawFS(f); err != nil {
			t.Fatal(err)
		}
		return false
	case errors.Is(err, unix.EBUSY):
		return true
	default:
		t.Fatal(err)
		return false
	}
}

func TestFreezeStopsAWriterAndThawLetsItGoOn(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			dev, dir := fileSystem(t, fsType)
			looptest.Mount(t, dir, "--bind")
			w := startWriter(t, dir)
			f := start(t, dev, Options{MaxFreeze: long})
			if err := f.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
			before := time.Now()
			w.standsStill(t)
			if !isFrozen(t, dir) {
				t.Fatal("it is not frozen")
			}
			if n := vmLocked(t, "self"); n == 0 {
				t.Error("the parent's memory is not locked")
			}
			if n := vmLocked(t, strconv.Itoa(f.cmd.Process.Pid)); n == 0 {
				t.Error("the watchdog's memory is not locked")
			}
			held := time.Since(before)
			d, err := f.Thaw()
			if err != nil || d < held {
				t.Fatalf("frozen for %v, at least %v: %v", d, held, err)
			}
			w.goesOn(t)
			writable(t, dir)
			if again, err := f.Thaw(); err != nil || again != d {
				t.Fatalf("second thaw: %v %v", again, err)
			}
			select {
			case <-f.Expired():
				t.Fatal("a thaw as ordered counts as expired")
			default:
			}
			if n := vmLocked(t, "self"); n != 0 {
				t.Errorf("%d kB of memory stay locked", n)
			}
		})
	}
}

// vmLocked is the locked memory of a process, in kB.
func vmLocked(t *testing.T, pid string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range lines(b) {
		if _, err := fmt.Sscanf(line, "VmLck: %d kB", &n); err == nil {
			return n
		}
	}
	t.Fatal("no VmLck")
	return 0
}

func TestDeadlineThawsAndTellsTheReader(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	w := startWriter(t, dir)
	f := start(t, dev, Options{MaxFreeze: 300 * time.Millisecond})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := f.WithContext(t.Context())
	defer cancel()
	<-f.Expired()
	<-ctx.Done()
	w.goesOn(t)
	d, err := f.Thaw()
	if !errors.Is(err, ErrTooLong) || d < 300*time.Millisecond {
		t.Fatalf("thaw after the deadline: %v %v", d, err)
	}
	writable(t, dir)
}

func TestFrozenByOthersIsAnErrorAndLeftFrozen(t *testing.T) {
	disk, parts := twoPartitions(t)
	one, two := looptest.Mount(t, parts[0]), looptest.Mount(t, parts[1])
	for _, theirs := range []string{one, two} {
		f := start(t, disk, Options{MaxFreeze: long})
		looptest.Run(t, "fsfreeze", "-f", theirs)
		if err := f.Freeze(t.Context()); !errors.Is(err, ErrFrozen) || !contains(err, theirs) {
			t.Fatalf("got %v, want ErrFrozen with %s", err, theirs)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if !isFrozen(t, theirs) {
			t.Fatal("thawed what somebody else froze")
		}
		looptest.Run(t, "fsfreeze", "-u", theirs)
		writable(t, one, two) // what was frozen before the failure is thawed
	}
}

func TestSecondFreezerIsRefused(t *testing.T) {
	dev, dir := fileSystem(t, "xfs")
	first, second := start(t, dev, Options{MaxFreeze: long}), start(t, dev, Options{MaxFreeze: long})
	if err := first.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := second.Freeze(t.Context()); !errors.Is(err, ErrFrozen) {
		t.Fatalf("got %v, want ErrFrozen", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if !isFrozen(t, dir) {
		t.Fatal("the second freezer thawed the first one's file system")
	}
	if _, err := first.Thaw(); err != nil {
		t.Fatal(err)
	}
	writable(t, dir)
}

func TestThawByOthersIsNoPointInTime(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	f := start(t, dev, Options{MaxFreeze: long})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	looptest.Run(t, "fsfreeze", "-u", dir)
	if _, err := f.Thaw(); !errors.Is(err, ErrThawed) {
		t.Fatalf("got %v, want ErrThawed", err)
	}
	writable(t, dir)
}

func TestReadOnlyFileSystemsDoNotHinder(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	looptest.Run(t, "mount", "-o", "remount,ro", dir)
	f := start(t, dev, Options{MaxFreeze: long})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Nor do they turn read-write in between.
	if err := exec.Command("mount", "-o", "remount,rw", dir).Run(); err == nil {
		t.Error("it was made writable during the freeze")
	}
	if _, err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	looptest.Run(t, "mount", "-o", "remount,rw", dir)
	writable(t, dir)
}

func TestUnfreezableFileSystemIsNamed(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	tmpfs := looptest.Mount(t, "none", "-t", "tmpfs")
	mounts, err := device.Mounts(dev)
	if err != nil {
		t.Fatal(err)
	}
	cannot, err := device.OnFileSystem(tmpfs)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Start(t.Context(), append(mounts, cannot), Options{MaxFreeze: long})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Freeze(t.Context()); !errors.Is(err, ErrNotSupported) || !contains(err, tmpfs) {
		t.Fatalf("got %v, want ErrNotSupported with %s", err, tmpfs)
	}
	writable(t, dir)
}
