// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// wantUntouched makes sure that a start has left nothing: the device can be
// claimed, and there is no device of the name.
func wantUntouched(t *testing.T, device, name string) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		t.Errorf("the device is claimed: %v", err)
	} else {
		f.Close()
	}
	if _, err := devmapper.Stat(name); !errors.Is(err, unix.ENXIO) {
		t.Errorf("%s is there: %v", name, err)
	}
	if _, err := os.Lstat(devmapper.Path(name)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the node of %s is there: %v", name, err)
	}
	if _, err := Open(device); !errors.Is(err, kernel.ErrNotTracked) {
		t.Errorf("open the tracker: %v", err)
	}
	if all, err := List(); err != nil || len(all) != 0 {
		t.Errorf("list: %v, %v", all, err)
	}
}

func TestADeviceIsTrackedUntilStop(t *testing.T) {
	device := newLoop(t, testSize)
	link := filepath.Join(t.TempDir(), "my-disk")
	if err := os.Symlink(device, link); err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, "my-disk-dsync")
	tr, err := Start(t.Context(), link, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if tr.Device() != "/dev/mapper/my-disk-dsync" || tr.Below() != device || tr.Size() != testSize {
		t.Errorf("%s on %s, %d bytes", tr.Device(), tr.Below(), tr.Size())
	}
	st := status(t, tr)
	want := kernel.Status{Device: tr.Device(), Below: device, Tracker: "dm", UUID: tr.UUID(), Epoch: 1, BlockSize: kernel.BlockSize, Reliable: true}
	if st != want || st.UUID == (kernel.UUID{}) {
		t.Errorf("status %+v", st)
	}
	info, err := devmapper.Stat("my-disk-dsync")
	if err != nil || !strings.HasPrefix(info.UUID, "DSYNC-") {
		t.Errorf("%+v, %v", info, err)
	}
	dmNode := "/dev/" + filepath.Base(mustDir(t, info.Dev))
	for _, path := range []string{tr.Device(), device, link, dmNode} {
		if found, err := Open(path); err != nil || found.UUID() != tr.UUID() || found.Device() != tr.Device() {
			t.Errorf("open by %s: %v, %v", path, found, err)
		}
		if _, err := Start(t.Context(), path, Options{Name: "other"}); err == nil || !strings.Contains(err.Error(), "tracked already, as "+tr.Device()) {
			t.Errorf("start again by %s: %v", path, err)
		}
	}
	if all, err := List(); err != nil || len(all) != 1 || all[0].UUID() != tr.UUID() {
		t.Errorf("list: %v, %v", all, err)
	}

	// In use: it stays, and says so.
	f := openDevice(t, tr.Device(), os.O_RDONLY)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err = tr.Stop(ctx)
	wantErr(t, err, "in use", "unmount")
	if !errors.Is(err, ErrInUse) {
		t.Errorf("it is no ErrInUse: %v", err)
	}
	wantReliable(t, tr)
	f.Close()
	if err := tr.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantUntouched(t, device, "my-disk-dsync")
	wantUnreliable(t, tr, "tracking was stopped")
	for _, err := range []error{tr.Stop(t.Context()), tr.Ack(t.Context(), 1), tr.Invalidate(t.Context(), "x"), tr.Restart(t.Context())} {
		if !errors.Is(err, kernel.ErrNotTracked) {
			t.Errorf("after the stop: %v", err)
		}
	}
	again, err := Start(t.Context(), link, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if again.UUID() == tr.UUID() {
		t.Error("a new history has the old UUID")
	}
}

func mustDir(t *testing.T, dev uint64) string {
	t.Helper()
	d, err := describe(dev)
	if err != nil {
		t.Fatal(err)
	}
	return d.dir
}

func TestTheContentIsTheDevicesOwn(t *testing.T) {
	device := newLoop(t, testSize)
	before := []byte("was here before")
	f := openDevice(t, device, os.O_RDWR)
	if _, err := f.WriteAt(before, 12345); err != nil {
		t.Fatal(err)
	}
	f.Close()
	tr := track(t, device)
	got := make([]byte, len(before))
	if _, err := openDevice(t, tr.Device(), os.O_RDONLY).ReadAt(got, 12345); err != nil || string(got) != string(before) {
		t.Errorf("read %q, %v", got, err)
	}
	if f, err := os.OpenFile(device, os.O_RDWR|unix.O_EXCL, 0); err == nil {
		f.Close()
		t.Error("the device beneath is not claimed")
	}
}

func TestAStartThatFailsLeavesNothing(t *testing.T) {
	boom := errors.New("boom")
	for _, point := range []string{"created", "loaded", "resumed"} {
		t.Run(point, func(t *testing.T) {
			device := newLoop(t, testSize)
			_, err := Start(t.Context(), device, Options{Name: "fails", hook: func(p string) error {
				if p == point {
					return boom
				}
				return nil
			}})
			if !errors.Is(err, boom) {
				t.Fatalf("start: %v", err)
			}
			wantUntouched(t, device, "fails")
		})
	}
	t.Run("canceled", func(t *testing.T) {
		device := newLoop(t, testSize)
		ctx, cancel := context.WithCancel(t.Context())
		_, err := Start(ctx, device, Options{Name: "fails", hook: func(string) error { cancel(); return nil }})
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("start: %v", err)
		}
		wantUntouched(t, device, "fails")
	})
}

func TestAKilledStartIsClearedAwayByTheNext(t *testing.T) {
	for _, point := range []string{"created", "loaded"} {
		t.Run(point, func(t *testing.T) {
			device := newLoop(t, testSize)
			killChild(t, device, point)
			if _, err := Open(device); !errors.Is(err, kernel.ErrNotTracked) {
				t.Errorf("open: %v", err)
			}
			if all, err := List(); err != nil || len(all) != 0 {
				t.Errorf("list: %v, %v", all, err)
			}
			dmtest.RemoveAtEnd(t, "another")
			tr, err := Start(t.Context(), device, Options{Name: "another"})
			if err != nil {
				t.Fatal(err)
			}
			wantReliable(t, tr)
			if _, err := devmapper.Stat(DefaultName(device)); !errors.Is(err, unix.ENXIO) {
				t.Errorf("the killed start's device is still there: %v", err)
			}
		})
	}
	t.Run("resumed", func(t *testing.T) {
		device := newLoop(t, testSize)
		dmtest.RemoveAtEnd(t, DefaultName(device))
		killChild(t, device, "resumed")
		tr, err := Open(device)
		if err != nil {
			t.Fatal(err)
		}
		wantReliable(t, tr)
	})
}

func TestADeviceInUseIsRefused(t *testing.T) {
	refused := func(t *testing.T, device string, texts ...string) {
		t.Helper()
		_, err := Start(t.Context(), device, Options{Name: "refused"})
		wantErr(t, err, append(texts, "in use", "/dev/mapper/refused")...)
		if !errors.Is(err, ErrInUse) {
			t.Errorf("it is no ErrInUse: %v", err)
		}
		if _, err := devmapper.Stat("refused"); !errors.Is(err, unix.ENXIO) {
			t.Errorf("it has left a device: %v", err)
		}
	}
	t.Run("claimed", func(t *testing.T) {
		device := newLoop(t, testSize)
		openDevice(t, device, os.O_RDONLY|unix.O_EXCL)
		refused(t, device, "unmount")
	})
	t.Run("under another mapped device", func(t *testing.T) {
		device := newLoop(t, testSize)
		dmtest.Map(t, "above", devmapper.Target{Length: 8, Type: "linear", Params: device + " 0"})
		refused(t, device)
	})
	t.Run("open for writing", func(t *testing.T) {
		device := newLoop(t, testSize)
		openDevice(t, device, os.O_WRONLY)
		refused(t, device, "open for writing", fmt.Sprintf("process %d ", os.Getpid()))
	})
	t.Run("under a loop device", func(t *testing.T) {
		device := newLoop(t, testSize)
		dmtest.Loop(t, 0, dmtest.LoopOptions{File: device})
		refused(t, device, "open for writing", "loop device")
	})
	t.Run("open for reading is fine", func(t *testing.T) {
		device := newLoop(t, testSize)
		openDevice(t, device, os.O_RDONLY)
		track(t, device)
	})
}

// TestACommitFromBeforeDoesNotPassBy: what lies dirty in the device's own page
// cache at the start is written out before the history begins.
func TestDirtyPagesOfTheDeviceAreWrittenBeforeTheHistoryBegins(t *testing.T) {
	device := newLoop(t, testSize)
	keep := openDevice(t, device, os.O_RDONLY) // so that the last close writes nothing out
	f := openDevice(t, device, os.O_RDWR)
	if _, err := f.WriteAt([]byte("dirty"), 5*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
	f.Close()
	tr := track(t, device)
	got := alignedBuffer(kernel.BlockSize)
	if _, err := openDevice(t, tr.Device(), os.O_RDONLY|unix.O_DIRECT).ReadAt(got, 5*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(got), "dirty") {
		t.Error("the mapped device does not have what was written before")
	}
	keep.Close()
}

func TestWhatCannotBeTrackedIsRefused(t *testing.T) {
	need(t)
	refused := func(device, name string, texts ...string) {
		t.Helper()
		_, err := Start(t.Context(), device, Options{Name: name})
		wantErr(t, err, texts...)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 5*kernel.BlockSize+512), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(file, "x", "not a block device")
	refused("/dev/null", "x", "not a block device")
	refused("/dev/nothing", "x", "no such file")
	refused(dmtest.Loop(t, 0, dmtest.LoopOptions{File: file, ReadOnly: true}), "x", "read-only")
	refused(dmtest.Loop(t, 0, dmtest.LoopOptions{File: file, BlockSize: 4096}), "x", "no multiple of its sectors of 4096")
	device := newLoop(t, testSize)
	for _, name := range []string{"a b", "a/b", "ä", "control", "..", strings.Repeat("n", 128)} {
		refused(device, name, "name")
	}
	dmtest.Map(t, "taken", devmapper.Target{Length: 8, Type: "zero"})
	refused(device, "taken", "already", "--as")
	wantUntouched(t, device, "x")
}

func TestNamesAndSizesOfAllKinds(t *testing.T) {
	for name, sectors := range map[string]int64{
		"a": 1, "x#+-.:=@_y": 7, strings.Repeat("n", 127): 9, "c": 8*64 + 1, "d": 1 << 18, "e": 1<<18 + 1, "f": 1<<18 - 1,
	} {
		device := newLoop(t, sectors*512)
		dmtest.RemoveAtEnd(t, name)
		tr, err := Start(t.Context(), device, Options{Name: name})
		if err != nil {
			t.Error(err)
			continue
		}
		if tr.Size() != sectors*512 {
			t.Errorf("%s: %d bytes instead of %d sectors", name, tr.Size(), sectors)
		}
		f, err := os.OpenFile(tr.Device(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("x"), sectors*512-1); err != nil {
			t.Error(err)
		}
		f.Close()
		b := turn(t, tr)
		if b.Blocks() != kernel.BlocksOf(sectors*512) {
			t.Errorf("%s: %d blocks", name, b.Blocks())
		}
		wantBlocks(t, b, b.Blocks()-1)
		wantReliable(t, tr)
		if err := tr.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
