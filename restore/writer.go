// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

const (
	defaultWriters = 8
	batchBytes     = 1 << 20 // of one batch, and of one write at most
)

// batch is whole blocks for the target, in aligned memory. What follows one
// another on the device is one write.
type batch struct {
	buf    []byte
	used   int
	writes []kernel.Extent // in the order of buf
}

// job is a batch, or a range of zeros of whole blocks if batch is nil.
type job struct {
	batch *batch
	zeros kernel.Extent
}

// seam is a block of which the bytes come from several blobs.
type seam struct {
	buf  []byte
	have int
}

// writer writes to a target with several goroutines. The first error cancels
// everything.
type writer struct {
	target *target
	size   int64 // of the snapshot's device
	cancel context.CancelCauseFunc
	done   func(bytes int64) // what the target now holds more; from many goroutines
	jobs   chan job
	free   chan *batch
	wg     sync.WaitGroup

	mu    sync.Mutex
	seams map[int64]*seam // by the block's offset
	tail  []byte          // the device's last block if it is short

	written, zeroed atomic.Int64
}

// startWriter starts the goroutines, which end when the writer is closed.
// fetches is how many batchers there are at a time, but for those of what is left of slices.
func startWriter(ctx context.Context, cancel context.CancelCauseFunc, t *target, size int64, parallel, fetches int, done func(int64)) *writer {
	if parallel <= 0 {
		parallel = defaultWriters
	}
	batches := parallel + 2*fetches
	w := &writer{
		target: t, size: size, cancel: cancel, done: done, seams: map[int64]*seam{},
		jobs: make(chan job, batches), free: make(chan *batch, batches),
	}
	for range batches {
		w.free <- &batch{}
	}
	for range parallel {
		w.wg.Go(func() {
			for j := range w.jobs {
				if err := w.do(ctx, j); err != nil {
					cancel(err)
				}
			}
		})
	}
	return w
}

func (w *writer) do(ctx context.Context, j job) error {
	b := j.batch
	if b == nil {
		return w.doZeros(ctx, j.zeros)
	}
	defer func() {
		b.used, b.writes = 0, b.writes[:0]
		w.free <- b
	}()
	at := int64(0)
	for _, e := range b.writes {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := w.target.write(b.buf[at:at+e.Length], e.Offset); err != nil {
			return err
		}
		at += e.Length
		w.written.Add(e.Length)
		w.done(e.Length)
	}
	return nil
}

func (w *writer) doZeros(ctx context.Context, e kernel.Extent) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := w.target.zero(ctx, e); err != nil {
		return err
	}
	w.zeroed.Add(e.Length)
	w.done(e.Length)
	return nil
}

func (w *writer) send(ctx context.Context, j job) error {
	select {
	case w.jobs <- j:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// zeros has a range zeroed, in slices.
func (w *writer) zeros(ctx context.Context, e kernel.Extent) error {
	if short := e.Length % kernel.BlockSize; short != 0 {
		w.mu.Lock()
		w.tail = make([]byte, short)
		w.mu.Unlock()
		e.Length -= short
	}
	for e.Length > 0 {
		// Slices end at round offsets, which suits whatever unmaps.
		n := min(e.Length, zeroSlice-e.Offset%zeroSlice)
		if err := w.send(ctx, job{zeros: kernel.Extent{Offset: e.Offset, Length: n}}); err != nil {
			return err
		}
		e.Offset, e.Length = e.Offset+n, e.Length-n
	}
	return nil
}

// fill adds bytes to the block that starts at block, and returns it when it
// has all. The device's last block, if it is short, is kept instead.
func (w *writer) fill(block, in int64, data []byte) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.seams[block]
	if s == nil {
		s = &seam{buf: make([]byte, kernel.BlockSize)}
		w.seams[block] = s
	}
	copy(s.buf[in:], data)
	s.have += len(data)
	want := min(kernel.BlockSize, w.size-block)
	if int64(s.have) < want {
		return nil
	}
	delete(w.seams, block)
	if want < kernel.BlockSize {
		w.tail = s.buf[:want]
		return nil
	}
	return s.buf
}

// abandon forgets the blocks that are not complete, because a blob of theirs
// was bad, and returns them.
func (w *writer) abandon() (out []kernel.Extent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for off := range w.seams {
		out = append(out, kernel.Extent{Offset: off, Length: min(kernel.BlockSize, w.size-off)})
	}
	clear(w.seams)
	return out
}

// finish waits for all writes and makes them durable. It must be called; if
// ctx is done it only waits.
func (w *writer) finish(ctx context.Context) error {
	close(w.jobs)
	w.wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if n := int64(len(w.tail)); n > 0 {
		// Last, so that no direct write shares a page with it any more.
		if err := w.target.writeTail(w.tail, w.size-n); err != nil {
			return err
		}
		w.written.Add(n)
		w.done(n)
	}
	return w.target.sync()
}

// batcher is the sink of one fetching goroutine.
type batcher struct {
	ctx context.Context //nolint:containedctx // of one fetch
	w   *writer
	b   *batch
	// follow, if set, holds what may come right behind a segment.
	follow *hold
}

func (b *batcher) blob(segs []segment, plain []byte) error {
	for _, s := range segs {
		if err := b.segment(s.off, plain[s.in:s.in+s.length]); err != nil {
			return err
		}
		if err := b.followers(s.off + s.length); err != nil {
			return err
		}
	}
	return nil
}

// followers writes what is held from off on.
func (b *batcher) followers(off int64) error {
	for b.follow != nil {
		data := b.follow.take(off)
		if data == nil {
			break
		}
		if err := b.put(off, data); err != nil {
			return err
		}
		off += int64(len(data))
	}
	return nil
}

// segment writes whole blocks, and leaves what is at its ends to the seams.
func (b *batcher) segment(off int64, data []byte) error {
	if in := off % kernel.BlockSize; in != 0 {
		n := min(kernel.BlockSize-in, int64(len(data)))
		if err := b.fill(off-in, in, data[:n]); err != nil {
			return err
		}
		off, data = off+n, data[n:]
	}
	whole := len(data) / kernel.BlockSize * kernel.BlockSize
	if err := b.put(off, data[:whole]); err != nil || whole == len(data) {
		return err
	}
	return b.fill(off+int64(whole), 0, data[whole:])
}

func (b *batcher) fill(block, in int64, data []byte) error {
	if full := b.w.fill(block, in, data); full != nil {
		return b.put(block, full)
	}
	return nil
}

// put adds whole blocks to the batch.
func (b *batcher) put(off int64, data []byte) error {
	for len(data) > 0 {
		if b.b == nil {
			select {
			case b.b = <-b.w.free:
			case <-b.ctx.Done():
				return context.Cause(b.ctx)
			}
			if b.b.buf == nil {
				b.b.buf = device.AlignedBuffer(batchBytes)
			}
		}
		x := b.b
		n := copy(x.buf[x.used:], data)
		x.used += n
		if k := len(x.writes); k > 0 && x.writes[k-1].End() == off {
			x.writes[k-1].Length += int64(n)
		} else {
			x.writes = append(x.writes, kernel.Extent{Offset: off, Length: int64(n)})
		}
		off, data = off+int64(n), data[n:]
		if x.used == len(x.buf) {
			if err := b.close(); err != nil {
				return err
			}
		}
	}
	return nil
}

// close hands the batch to the writers.
func (b *batcher) close() error {
	x := b.b
	if x == nil {
		return nil
	}
	b.b = nil
	return b.w.send(b.ctx, job{batch: x})
}
