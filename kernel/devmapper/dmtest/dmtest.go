// SPDX-License-Identifier: BSD-2-Clause

// Package dmtest gives tests loop devices and device-mapper devices that go
// away with the test. It needs root, and no program but the kernel, so that
// it runs in a guest that has nothing else.
package dmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// Need skips a test where the kernel has no device-mapper.
func Need(t testing.TB) {
	t.Helper()
	if _, _, _, err := devmapper.Version(); err != nil {
		t.Skip("this test runs in a guest with device-mapper: ", err)
	}
}

// LoopOptions tune Loop; the zero value is fine.
type LoopOptions struct {
	BlockSize uint32 // logical, in bytes; default 512
	ReadOnly  bool
	File      string // an existing one; default: a new, sparse one
}

// Loop attaches a file of size bytes to a loop device, and tells the device's
// node.
func Loop(t testing.TB, size int64, o LoopOptions) string {
	t.Helper()
	if o.File == "" {
		o.File = filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(o.File, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(o.File, size); err != nil {
			t.Fatal(err)
		}
	}
	device, err := attach(o)
	if err != nil {
		t.Fatalf("attach loop device: %v", err)
	}
	t.Cleanup(func() {
		if err := detach(device); err != nil {
			t.Errorf("detach %s: %v", device, err)
		}
	})
	return device
}

func attach(o LoopOptions) (string, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer control.Close()
	flags := os.O_RDWR
	config := unix.LoopConfig{Size: o.BlockSize}
	if o.ReadOnly {
		flags, config.Info.Flags = os.O_RDONLY, unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(o.File, flags, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	config.Fd = uint32(file.Fd())
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", err
		}
		device := fmt.Sprintf("/dev/loop%d", n)
		f, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		err = unix.IoctlLoopConfigure(int(f.Fd()), &config)
		_ = f.Close()
		if errors.Is(err, unix.EBUSY) {
			continue // somebody else was faster
		}
		return device, err
	}
}

// detach waits for whoever looks at the device for a moment.
func detach(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	_, err = unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CLR_FD)
	if err := errors.Join(err, f.Close()); err != nil && !errors.Is(err, unix.ENXIO) {
		return err
	}
	name := filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file")
	for range 500 {
		if _, err := os.Stat(name); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("it is still in use")
}

// Sectors is the size of a device in sectors of 512 bytes.
func Sectors(t testing.TB, device string) uint64 {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	return uint64(size / 512)
}

// RemoveAtEnd removes a device-mapper device when the test has ended, if it is
// still there.
func RemoveAtEnd(t testing.TB, name string) {
	t.Helper()
	t.Cleanup(func() {
		err := devmapper.Remove(context.Background(), name, devmapper.RemoveOptions{})
		if err != nil && !errors.Is(err, unix.ENXIO) {
			t.Errorf("clean up: %v", err)
		}
	})
}

// Map makes a device-mapper device with a table. It goes away with the test.
func Map(t testing.TB, name string, targets ...devmapper.Target) string {
	t.Helper()
	if _, err := devmapper.Create(name, ""); err != nil {
		t.Fatal(err)
	}
	RemoveAtEnd(t, name)
	if err := devmapper.Load(name, devmapper.LoadOptions{}, targets...); err != nil {
		t.Fatal(err)
	}
	if err := devmapper.Resume(t.Context(), name, devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	return devmapper.Path(name)
}
