// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

// stackOn makes an ext4 on a loop device on a file in dir.
func stackOn(t *testing.T, dir string) (dev, top string) {
	t.Helper()
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 32*mib); err != nil {
		t.Fatal(err)
	}
	dev = looptest.Attach(t, image)
	looptest.Mkfs(t, "ext4", dev)
	return dev, looptest.Mount(t, dev)
}

func TestStackIsFrozenFromTheTopDown(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			dev, dir := fileSystem(t, fsType)
			_, top := stackOn(t, dir)
			w := startWriter(t, top)
			f := start(t, dev, Options{MaxFreeze: long})
			if err := f.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.standsStill(t)
			if !isFrozen(t, dir) || !isFrozen(t, top) {
				t.Fatal("part of the stack is not frozen")
			}
			if _, err := f.Thaw(); err != nil {
				t.Fatal(err)
			}
			w.goesOn(t)
			writable(t, dir, top)
		})
	}
}

// TestStuckFreezeEndsAtTheDeadline freezes a stack in the wrong order, as if it
// were not known to be one: the freeze on top waits for the one below, and
// only the deadline frees it.
func TestStuckFreezeEndsAtTheDeadline(t *testing.T) {
	dev, dir := fileSystem(t, "ext4")
	_, top := stackOn(t, dir)
	startWriter(t, top)
	mounts, err := device.Mounts(dev)
	if err != nil || len(mounts) != 2 {
		t.Fatalf("%v %v", mounts, err)
	}
	mounts[0].Depth, mounts[1].Depth = 1, 0
	f, err := Start(t.Context(), mounts, Options{MaxFreeze: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Freeze(t.Context()); !errors.Is(err, ErrTooLong) {
		t.Fatalf("got %v, want ErrTooLong", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	writable(t, dir, top)
}

// TestFrozenBelowByOthersIsGivenUp freezes the lower file system of a stack by
// other means: then the upper one cannot even be synced.
func TestFrozenBelowByOthersIsGivenUp(t *testing.T) {
	_, dir := fileSystem(t, "ext4")
	dev, top := stackOn(t, dir)
	if err := os.WriteFile(top+"/dirty", make([]byte, 4*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	f := start(t, dev, Options{MaxFreeze: 300 * time.Millisecond, MaxSync: 300 * time.Millisecond})
	looptest.Run(t, "fsfreeze", "-f", dir)
	err := f.Freeze(t.Context())
	looptest.Thaw(dir)
	if !errors.Is(err, ErrTooLong) {
		t.Fatalf("got %v, want ErrTooLong", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	writable(t, dir, top)
}

// twoPartitions makes a disk with two file systems.
func twoPartitions(t *testing.T) (disk string, parts [2]string) {
	t.Helper()
	disk = looptest.Device(t, 128*mib)
	for i := range parts {
		parts[i] = looptest.AddPartition(t, disk, i+1, looptest.Partition{Start: uint32(2048 + i*100000), Sectors: 90000})
		looptest.Mkfs(t, "ext4", parts[i])
	}
	return disk, parts
}

func TestCoversMissesWhatWasMountedSince(t *testing.T) {
	disk, parts := twoPartitions(t)
	looptest.Mount(t, parts[0])
	f := start(t, disk, Options{MaxFreeze: long})
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	check := func() error {
		mounts, err := device.Mounts(disk)
		if err != nil {
			t.Fatal(err)
		}
		return f.Covers(mounts)
	}
	if err := check(); err != nil {
		t.Fatal(err)
	}
	dir := looptest.Mount(t, parts[1])
	if err := check(); err == nil || !contains(err, dir) {
		t.Fatalf("got %v, want an error that names %s", err, dir)
	}
	if _, err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
}
