// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// ioctls of linux/fs.h on a range of a block device.
const (
	blkDiscard = 0x1277 // _IO(0x12, 119)
	blkZeroOut = 0x127f // _IO(0x12, 127)
)

func rangeIoctl(f *os.File, request uintptr, first, n int64) error {
	r := [2]uint64{uint64(first) * kernel.BlockSize, uint64(n) * kernel.BlockSize}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}

func discardBlocks(t testing.TB, device string, first, n int64) {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	if err := rangeIoctl(f, blkDiscard, first, n); err != nil {
		t.Errorf("discard blocks %d+%d of %s: %v", first, n, device, err)
	}
}

// kindOfWrite changes the blocks first to first+n-1 of a device, and has done
// so on return.
type kindOfWrite struct {
	name     string
	first, n int64
	needs    string // of the device's queue, a number other than zero
	do       func(t testing.TB, device string)
}

// What not every device-mapper target passes on.
const (
	discards = "discard_max_bytes"
	zeroes   = "write_zeroes_max_bytes"
)

// supports reports whether a device does an operation of its own, or any that
// needs nothing.
func supports(t testing.TB, device, need string) bool {
	t.Helper()
	if need == "" {
		return true
	}
	n, err := readNumber(mustResolve(t, device).sysfs("queue", need))
	if err != nil {
		t.Fatal(err)
	}
	return n != 0
}

var everyKindOfWrite = []kindOfWrite{
	{"direct", 10, 3, "", func(t testing.TB, device string) {
		writeRange(t, openDirect(t, device), 10, 3)
	}},
	{"one sector of a block", 20, 1, "", func(t testing.TB, device string) {
		if _, err := openDirect(t, device).WriteAt(alignedBuffer(512), 20*4096+1024); err != nil {
			t.Fatal(err)
		}
	}},
	{"large, over several words", 1000, 1024, "", func(t testing.TB, device string) {
		writeRange(t, openDirect(t, device), 1000, 1024)
	}},
	{"buffered and synced", 3001, 130, "", func(t testing.TB, device string) {
		f := openDevice(t, device, os.O_RDWR)
		writeRange(t, f, 3001, 130)
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}},
	{"flush and force unit access", 4000, 1, "", func(t testing.TB, device string) {
		writeRange(t, openDevice(t, device, os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC), 4000, 1)
	}},
	{"discard", 5000, 777, discards, func(t testing.TB, device string) {
		discardBlocks(t, device, 5000, 777)
	}},
	{"zero out", 7000, 300, "", func(t testing.TB, device string) {
		if err := rangeIoctl(openDevice(t, device, os.O_RDWR), blkZeroOut, 7000, 300); err != nil {
			t.Fatal(err)
		}
	}},
	{"punch hole", 8000, 65, zeroes, func(t testing.TB, device string) {
		fallocate(t, device, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8000, 65)
	}},
	{"zero range", 9000, 64, "", func(t testing.TB, device string) {
		fallocate(t, device, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 9000, 64)
	}},
	{"mapped", 9500, 2, "", func(t testing.TB, device string) {
		f := openDevice(t, device, os.O_RDWR)
		b, err := unix.Mmap(int(f.Fd()), 9500*4096, 2*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(b)
		b[0], b[4096] = 1, 1
		if err := unix.Msync(b, unix.MS_SYNC); err != nil {
			t.Fatal(err)
		}
	}},
	{"asynchronous, many in flight", 10000, 64, "", func(t testing.TB, device string) {
		f := openDirect(t, device)
		var offsets []int64
		for i := range int64(64) {
			offsets = append(offsets, (10000+(i*37)%64)*4096)
		}
		newURing(t).write(t, f, alignedBuffer(4096), offsets)
	}},
	{"everything behind a point", 20000, 1<<18 - 20000, discards, func(t testing.TB, device string) {
		discardBlocks(t, device, 20000, 1<<18-20000)
	}},
}

func writeRange(t testing.TB, f *os.File, first, n int64) {
	t.Helper()
	if _, err := f.WriteAt(alignedBuffer(int(n*kernel.BlockSize)), first*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
}

func fallocate(t testing.TB, device string, mode uint32, first, n int64) {
	t.Helper()
	f := openDevice(t, device, os.O_RDWR)
	if err := unix.Fallocate(int(f.Fd()), mode, first*kernel.BlockSize, n*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
}
