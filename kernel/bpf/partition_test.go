// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// blkpg mirrors struct blkpg_ioctl_arg and struct blkpg_partition of
// linux/blkpg.h.
type (
	blkpgArg struct {
		op, flags, size int32
		data            unsafe.Pointer
	}
	blkpgPartition struct {
		start, length int64
		number        int32
		_             [128]byte
	}
)

const (
	blkpgAdd    = 1
	blkpgDelete = 2
	blkpgResize = 3
)

func blkpg(t testing.TB, device string, op int32, number int32, start, length int64) {
	t.Helper()
	f := openDevice(t, device, os.O_RDONLY)
	defer f.Close()
	p := blkpgPartition{start: start, length: length, number: number}
	arg := blkpgArg{op: op, size: int32(unsafe.Sizeof(p)), data: unsafe.Pointer(&p)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		t.Fatalf("BLKPG %d of %s: %v", op, device, errno)
	}
}

// newPartition makes a partition on a new loop device, both of a number of
// bytes.
func newPartition(t testing.TB, diskSize, start, length int64) (disk, part string) {
	t.Helper()
	disk, _ = newLoop(t, diskSize, "-P")
	blkpg(t, disk, blkpgAdd, 1, start, length)
	t.Cleanup(func() {
		if exists("/sys/class/block/" + filepath.Base(disk) + "p1") {
			blkpg(t, disk, blkpgDelete, 1, 0, 0)
		}
	})
	part = disk + "p1"
	for range 100 { // devtmpfs makes the node from another thread
		if exists(part) {
			return disk, part
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("there is no %s", part)
	return "", ""
}

func TestPartitionCountsWritesThroughItselfAndItsDisk(t *testing.T) {
	// A start that is no multiple of 4 KiB: blocks count from it.
	const start, length = 1<<20 + 3*512, 8 << 20
	disk, part := newPartition(t, 32<<20, start, length)
	trackedPart, trackedDisk := track(t, part), track(t, disk)
	pf, df := openDirect(t, part), openDirect(t, disk)
	buf := alignedBuffer(64 << 10)
	write := func(f *os.File, offset, n int64) {
		t.Helper()
		if _, err := f.WriteAt(buf[:n], offset); err != nil {
			t.Fatal(err)
		}
	}
	wantPart := kernel.NewBitmap(kernel.BlocksOf(length))
	wantDisk := kernel.NewBitmap(kernel.BlocksOf(32 << 20))
	mark := func(b *kernel.Bitmap, offset, n int64) {
		b.SetRange(offset/kernel.BlockSize, (offset+n-1)/kernel.BlockSize)
	}

	write(pf, 40960, 8192) // through the partition
	mark(wantPart, 40960, 8192)
	mark(wantDisk, start+40960, 8192)

	write(df, start+1<<20, 512) // through the disk, inside
	mark(wantPart, 1<<20, 512)
	mark(wantDisk, start+1<<20, 512)

	write(df, start-4096, 8192) // over the partition's start
	mark(wantPart, 0, 4096)
	mark(wantDisk, start-4096, 8192)

	write(df, start+length-512, 4096) // over its end
	mark(wantPart, length-512, 512)
	mark(wantDisk, start+length-512, 4096)

	write(df, 0, 4096) // outside
	mark(wantDisk, 0, 4096)
	write(df, start+length, 4096)
	mark(wantDisk, start+length, 4096)

	wantEqual(t, rotate(t, trackedPart), wantPart)
	wantEqual(t, rotate(t, trackedDisk), wantDisk)
	wantReliable(t, trackedPart)
	wantReliable(t, trackedDisk)
}

func TestPartitionResizedIsUnreliable(t *testing.T) {
	disk, part := newPartition(t, 32<<20, 1<<20, 8<<20)
	tr := track(t, part)
	const reason = "changed its size from 8388608 to 4194304"
	blkpg(t, disk, blkpgResize, 1, 1<<20, 4<<20)
	wantUnreliable(t, tr, reason)
	blkpg(t, disk, blkpgResize, 1, 1<<20, 8<<20)
	wantUnreliable(t, tr, reason) // back where it was: the verdict stays
}

func TestPartitionMovedIsUnreliable(t *testing.T) {
	disk, part := newPartition(t, 32<<20, 1<<20, 8<<20)
	tr := track(t, part)
	blkpg(t, disk, blkpgDelete, 1, 0, 0)
	time.Sleep(200 * time.Millisecond) // so that the kernel may give its number again
	blkpg(t, disk, blkpgAdd, 1, 2<<20, 8<<20)
	// With another number it is another device, and the old one is gone.
	reason := "moved from sector 2048 to 4096"
	if dev, err := deviceNumber(part); err != nil || dev != tr.target.dev {
		reason = "is gone"
	}
	wantUnreliable(t, tr, reason)
}

func TestPartitionThatIsGoneIsUnreliable(t *testing.T) {
	disk, part := newPartition(t, 32<<20, 1<<20, 8<<20)
	tr := track(t, part)
	blkpg(t, disk, blkpgDelete, 1, 0, 0)
	wantUnreliable(t, tr, fmt.Sprintf("the device %s is gone", part))
	again, err := Open(part) // by its name, since the node is gone too
	if err != nil {
		t.Fatal(err)
	}
	if again.UUID() != tr.UUID() {
		t.Fatalf("opened %s, want %s", again.UUID(), tr.UUID())
	}
	if err := again.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}
