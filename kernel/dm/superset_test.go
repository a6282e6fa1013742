// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

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

// TestNoChangeIsMissed holds random writes, buffered and direct, and discards
// from several writers against the epochs that each may belong to; and what
// was marked against what was written at all.
func TestNoChangeIsMissed(t *testing.T) {
	const blocks = 1 << 16
	count, rotations := int64(4000), int64(40)
	if os.Getenv("SOAK") != "" {
		count, rotations = 100_000, 400
	}
	tr := track(t, newLoop(t, blocks*kernel.BlockSize))
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var (
		began, returned, ops atomic.Int64
		changes              [supersetWriters][]change
		epochs               []*kernel.Bitmap
		writers              sync.WaitGroup
	)
	defer writers.Wait()
	direct := openDevice(t, tr.Device(), os.O_RDWR|unix.O_DIRECT)
	buffered := openDevice(t, tr.Device(), os.O_RDWR)
	for w := range supersetWriters {
		rng := rand.New(rand.NewPCG(seed, uint64(w)))
		writers.Go(func() {
			for ops.Add(1) <= count && !t.Failed() {
				sectors := 1 + rng.Int64N(64)
				if rng.IntN(50) == 0 {
					sectors = 1 + rng.Int64N(4096)
				}
				// Direct and buffered writes that meet are an I/O error.
				half, f := int64(0), direct
				kind := rng.IntN(10)
				if kind < 3 {
					half, f = blocks/2*8, buffered
				}
				at := half + rng.Int64N(blocks/2*8-sectors)
				c := change{first: at / 8, last: (at + sectors - 1) / 8, from: returned.Load()}
				var err error
				switch {
				case kind == 9:
					arg := [2]uint64{uint64(at * 512), uint64(sectors * 512)}
					_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg)))
					runtime.KeepAlive(&arg)
					if errno != 0 {
						err = errno
					}
				default:
					b := alignedBuffer(int(sectors * 512))
					b[0] = byte(rng.Uint32())
					_, err = f.WriteAt(b, at*512)
					if err == nil && f == buffered {
						err = unix.SyncFileRange(int(f.Fd()), at*512, sectors*512, unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER|unix.SYNC_FILE_RANGE_WAIT_BEFORE)
					}
				}
				c.to = began.Load()
				if err != nil {
					t.Error(err)
				}
				changes[w] = append(changes[w], c)
			}
		})
	}
	turns := func() {
		began.Add(1)
		e, err := tr.Rotate(noContext, kernel.NewNonce())
		returned.Add(1)
		if err := errors.Join(err, tr.Ack(noContext, e.Position.Epoch)); err != nil {
			t.Fatal(err)
		}
		epochs = append(epochs, e.Bitmap)
	}
	for i := range rotations {
		for ops.Load() < (i+1)*count/rotations && !t.Failed() {
			runtime.Gosched()
		}
		turns()
	}
	writers.Wait()
	turns()
	marked := kernel.NewBitmap(blocks)
	for _, e := range epochs {
		if err := marked.Or(e); err != nil {
			t.Fatal(err)
		}
	}
	written := kernel.NewBitmap(blocks)
	for _, list := range changes {
		for _, c := range list {
			written.SetRange(c.first, c.last)
			for i := c.first; i <= c.last; i++ {
				found := false
				for n := c.from; n <= min(c.to, int64(len(epochs)-1)); n++ {
					found = found || epochs[n].Get(i)
				}
				if !found {
					t.Fatalf("block %d was written between rotations %d and %d, and is in no epoch between", i, c.from, c.to)
				}
			}
		}
	}
	// A buffered write of part of a page writes the page out; nothing else is
	// marked that was not written.
	for i := marked.NextSet(0); i < blocks; i = marked.NextSet(i + 1) {
		if !written.Get(i) {
			t.Fatalf("block %d is marked and was not written", i)
		}
	}
	wantReliable(t, tr)
}
