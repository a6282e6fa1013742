// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// uring is an io_uring with room for uringDepth operations at once, which are
// submitted together, under one plug of the block layer.
type uring struct {
	fd              int
	tail, head      *uint32 // of submission; of completion
	mask, cqMask    uint32
	cqTail          *uint32
	array           []uint32
	sqes            []sqe
	cqes            []cqe
	rings, sqesPage []byte
	fails           bool // operations may fail
	oneByOne        bool // discards are not submitted by it
}

const uringDepth = 64

// sqe, cqe and uringParams mirror linux/io_uring.h.
type (
	sqe struct {
		opcode, flags uint8
		ioprio        uint16
		fd            int32
		off, addr     uint64 // of a command: its number, in the low half of off
		length        uint32
		rwFlags       uint32
		userData      uint64
		_             [8]byte
		addr3         uint64
		_             uint64
	}
	cqe struct {
		userData uint64
		res      int32
		flags    uint32
	}
	uringParams struct {
		sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
		_                                                    [3]uint32
		sq                                                   struct{ head, tail, mask, entries, flags, dropped, array, _, _, _ uint32 }
		cq                                                   struct{ head, tail, mask, entries, overflow, cqes, flags, _, _, _ uint32 }
	}
)

const (
	opWrite            = 23
	opCommand          = 46
	commandDiscard     = 0x1200 // BLOCK_URING_CMD_DISCARD
	uringOffsetSQEs    = 0x10000000
	uringEnterGetEvent = 1
)

func newURing(t testing.TB) *uring {
	t.Helper()
	var p uringParams
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uringDepth, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		t.Fatalf("io_uring_setup: %v", errno)
	}
	u := &uring{fd: int(fd)}
	t.Cleanup(func() { _ = unix.Close(u.fd) })
	size := max(int(p.sq.array+p.sqEntries*4), int(p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(cqe{}))))
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	var err error
	if u.rings, err = unix.Mmap(u.fd, 0, size, prot, flags); err != nil {
		t.Fatal(err)
	}
	if u.sqesPage, err = unix.Mmap(u.fd, uringOffsetSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{})), prot, flags); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = unix.Munmap(u.rings), unix.Munmap(u.sqesPage) })
	at := func(offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&u.rings[offset])) }
	u.tail, u.mask = at(p.sq.tail), *at(p.sq.mask)
	u.head, u.cqTail, u.cqMask = at(p.cq.head), at(p.cq.tail), *at(p.cq.mask)
	u.array = unsafe.Slice(at(p.sq.array), p.sqEntries)
	u.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(&u.sqesPage[0])), p.sqEntries)
	u.cqes = unsafe.Slice((*cqe)(unsafe.Pointer(&u.rings[p.cq.cqes])), p.cqEntries)
	return u
}

// do submits operations at once and waits for them; each must give want.
func (u *uring) do(t testing.TB, want int32, ops []sqe) {
	for len(ops) > uringDepth {
		u.do(t, want, ops[:uringDepth])
		ops = ops[uringDepth:]
	}
	tail := atomic.LoadUint32(u.tail)
	for i, op := range ops {
		slot := (tail + uint32(i)) & u.mask
		u.sqes[slot], u.array[slot] = op, slot
	}
	atomic.StoreUint32(u.tail, tail+uint32(len(ops)))
	for submit, done := len(ops), 0; done < len(ops); {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.fd), uintptr(submit), uintptr(len(ops)-done), uringEnterGetEvent, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			t.Errorf("io_uring_enter: %v", errno)
			return
		}
		if errno == 0 {
			submit -= int(n)
		}
		for ; atomic.LoadUint32(u.head) != atomic.LoadUint32(u.cqTail); done++ {
			if res := u.cqes[atomic.LoadUint32(u.head)&u.cqMask].res; res != want && !u.fails {
				t.Errorf("operation of io_uring gave %d, want %d", res, want)
			}
			atomic.AddUint32(u.head, 1)
		}
	}
	runtime.KeepAlive(u)
}

// write writes buf at each offset, in bytes.
func (u *uring) write(t testing.TB, f *os.File, buf []byte, offsets []int64) {
	ops := make([]sqe, len(offsets))
	for i, offset := range offsets {
		ops[i] = sqe{
			opcode: opWrite, fd: int32(f.Fd()), off: uint64(offset),
			addr: uint64(uintptr(unsafe.Pointer(&buf[0]))), length: uint32(len(buf)),
		}
	}
	u.do(t, int32(len(buf)), ops)
	runtime.KeepAlive(buf)
}

// discard discards ranges of blocks. Before Linux 6.12 io_uring cannot, nor can
// it on devices that have to wait (dm-crypt), and they are discarded one by one.
func (u *uring) discard(t testing.TB, f *os.File, ranges [][2]int64) {
	if u.oneByOne || !uringDiscards(t) {
		for _, r := range ranges {
			arg := [2]uint64{uint64(r[0] * kernel.BlockSize), uint64(r[1] * kernel.BlockSize)}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg))); errno != 0 && !u.fails {
				t.Errorf("discard %d blocks at %d: %v", r[1], r[0], errno)
			}
		}
		return
	}
	ops := make([]sqe, len(ranges))
	for i, r := range ranges {
		ops[i] = sqe{
			opcode: opCommand, fd: int32(f.Fd()), off: commandDiscard,
			addr: uint64(r[0] * kernel.BlockSize), addr3: uint64(r[1] * kernel.BlockSize),
		}
	}
	u.do(t, 0, ops)
}

// uringDiscards reports whether this kernel's io_uring knows discards of block
// devices, which came with Linux 6.12.
func uringDiscards(t testing.TB) bool {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 12
}
