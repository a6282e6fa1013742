// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Read is a range of a device, and the memory that takes it.
type Read struct {
	Offset int64
	Into   []byte
}

// queueDepth is how many reads one call has in flight at most.
const queueDepth = 64

// ReadExtents does all the reads, as [Device.ReadExtent] does one: of small ones up to most are
// in flight at once. They are given to the kernel together: a goroutine for each would cost more
// time in changing between threads than a read of a block takes, and while others compute, each
// that has ended waits for a processor before it can begin the next.
func (d *Device) ReadExtents(ctx context.Context, reads []Read, most int) error {
	most = max(1, min(most, len(reads), queueDepth))
	if d.align > 1 {
		if q := takeQueue(); q != nil {
			var err error
			reads, err = q.read(ctx, d, reads, most)
			q.put()
			if err != nil {
				return err
			}
		}
	}
	if len(reads) == 1 {
		return d.ReadExtent(ctx, reads[0].Into, reads[0].Offset)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(most)
	for _, r := range reads {
		g.Go(func() error { return d.ReadExtent(ctx, r.Into, r.Offset) })
	}
	return g.Wait()
}

// queue is a context of the kernel's asynchronous I/O: io_setup(2). io_uring would do as well,
// but many systems and containers forbid it.
//
// What ends is told by an eventfd, for which the Go runtime waits with all that it waits for. A
// call that waits in the kernel, as pread does, keeps a processor from all other goroutines until
// the runtime notices and takes it away.
type queue struct {
	id     uintptr
	ended  *os.File // the eventfd
	notify uint32   // its number
	blocks [queueDepth]iocb
	events [queueDepth]ioEvent
	free   []int  // of blocks
	reads  []Read // of each block in flight; they keep their memory alive
	left   []Read // those that are to be done another way
	failed bool   // one of those in flight did not give all that it should
}

// iocb is struct iocb of linux/aio_abi.h. What is not named stays zero.
type iocb struct {
	data   uint64 // given back with the event: its number
	_      [2]uint32
	opcode uint16
	_      int16
	fd     uint32
	buf    uint64
	length uint64
	offset int64
	_      uint64
	flags  uint32
	notify uint32 // eventfd
}

const (
	opPread    = 0 // IOCB_CMD_PREAD
	flagNotify = 1 // IOCB_FLAG_RESFD
)

// ioEvent is struct io_event.
type ioEvent struct {
	data, _ uint64
	res, _  int64
}

// queues are those that nobody uses. None is destroyed before the process ends, which waits until
// every processor has forgotten it, for some milliseconds.
var queues struct {
	sync.Mutex
	free   []*queue
	failed bool // the kernel gives none: too many are in use, or it has no such calls
}

// takeQueue returns nil if there is none to be had.
func takeQueue() *queue {
	queues.Lock()
	defer queues.Unlock()
	if n := len(queues.free); n > 0 {
		q := queues.free[n-1]
		queues.free = queues.free[:n-1]
		return q
	}
	if queues.failed {
		return nil
	}
	q := &queue{reads: make([]Read, queueDepth)}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		queues.failed = true
		return nil
	}
	q.ended, q.notify = os.NewFile(uintptr(fd), "eventfd"), uint32(fd)
	if err := q.ended.SetReadDeadline(time.Time{}); err != nil { // the runtime cannot wait for it
		_ = q.ended.Close()
		queues.failed = true
		return nil
	}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, queueDepth, uintptr(unsafe.Pointer(&q.id)), 0); errno != 0 {
		_ = q.ended.Close()
		queues.failed = true
		return nil
	}
	for i := range q.blocks {
		q.free = append(q.free, i)
	}
	return q
}

// put gives back a queue of which nothing is in flight.
func (q *queue) put() {
	queues.Lock()
	defer queues.Unlock()
	queues.free = append(queues.free, q)
}

// read does the reads that can be done this way, and returns the others: those that are not
// aligned, and those that did not give all that they should, so that they tell why when they are
// done one by one. Once one failed, no more are begun: a bad disk takes its time for each. Whatever
// happens, nothing is in flight on return.
func (q *queue) read(ctx context.Context, d *Device, reads []Read, most int) (left []Read, err error) {
	q.left, q.failed = nil, false
	ctlErr := d.control(func(fd int) {
		for flying := 0; len(reads) > 0 || flying > 0; {
			if cause := ctx.Err(); cause != nil && len(reads) > 0 {
				e := kernel.Extent{Offset: reads[0].Offset, Length: int64(len(reads[0].Into))}
				err, reads = &ReadError{d.path, e, cause}, nil
			}
			if q.failed {
				q.left, reads = append(q.left, reads...), nil
			}
			var n int
			reads, n = q.submit(d, fd, reads, most-flying)
			if flying += n; flying == 0 {
				continue
			}
			// While there is more to come, half of them are waited for: the device has the others
			// to do meanwhile.
			least := flying
			if len(reads) > 0 {
				least = max(1, flying/2)
			}
			flying -= q.reap(least)
		}
	})
	left, q.left = q.left, nil
	return left, errors.Join(ctlErr, err)
}

// submit starts up to room reads, and returns what is left of them, and how many it started.
func (q *queue) submit(d *Device, fd int, reads []Read, room int) (rest []Read, started int) {
	var list [queueDepth]*iocb
	n := 0
	for len(reads) > 0 && n < room {
		r := reads[0]
		reads = reads[1:]
		if !d.direct(r) {
			q.left = append(q.left, r)
			continue
		}
		i := q.free[len(q.free)-1]
		q.free = q.free[:len(q.free)-1]
		q.reads[i] = r
		q.blocks[i] = iocb{
			data: uint64(i), opcode: opPread, fd: uint32(fd), offset: r.Offset,
			buf: uint64(uintptr(unsafe.Pointer(&r.Into[0]))), length: uint64(len(r.Into)),
			flags: flagNotify, notify: q.notify,
		}
		list[n] = &q.blocks[i]
		n++
	}
	for started < n {
		took, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, q.id, uintptr(n-started), uintptr(unsafe.Pointer(&list[started])))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || took == 0 {
			break
		}
		started += int(took)
	}
	for _, b := range list[started:n] { // the kernel has no room, or cannot read this that way
		q.left = append(q.left, q.release(int(b.data)))
	}
	return reads, started
}

// release takes a block out of use.
func (q *queue) release(i int) Read {
	r := q.reads[i]
	q.reads[i] = Read{}
	q.free = append(q.free, i)
	return r
}

// reap waits until at least so many reads have ended, and returns how many have.
func (q *queue) reap(least int) (ended int) {
	var count [8]byte
	for {
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, q.id, 0, queueDepth, uintptr(unsafe.Pointer(&q.events)), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			// Memory that the kernel will write to must not be used for anything else.
			panic(os.NewSyscallError("io_getevents", errno))
		}
		for _, e := range q.events[:n] {
			if r := q.release(int(e.data)); e.res != int64(len(r.Into)) {
				q.left, q.failed = append(q.left, r), true
			}
		}
		if ended += int(n); ended >= least {
			return ended
		}
		// The count may be of reads that were reaped already: then there is a round for nothing, as
		// there is now and then in case a signal was lost.
		_ = q.ended.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := q.ended.Read(count[:]); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			panic(err) // as above
		}
	}
}

// direct reports whether a read is aligned as the device asks, and whole blocks of it.
func (d *Device) direct(r Read) bool {
	n, a := int64(len(r.Into)), int64(d.align)
	return n > 0 && n <= maxRead && r.Offset >= 0 && r.Offset%a == 0 && n%a == 0 && r.Offset+n <= d.size &&
		int64(uintptr(unsafe.Pointer(&r.Into[0])))%a == 0
}
