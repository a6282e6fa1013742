// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// mergeWriters is how many records are unpacked and written at a time.
const mergeWriters = 16

// applier writes the records of a stream, many at a time within a round.
type applier struct {
	m      *Merge
	r      *stream.Reader
	u      *stream.Unpacker
	told   *progress
	rounds int
	sample sampler

	written, zeroed atomic.Int64

	mu   sync.Mutex
	tail []byte // the device's last block if it is short: written last

	work chan *stream.Record
	free chan *stream.Record
}

// run reads the stream to its end, and returns once all of it is written.
func (a *applier) run(ctx context.Context) (err error) {
	parallel := a.m.o.Parallel
	if parallel <= 0 {
		parallel = mergeWriters
	}
	if a.u, err = stream.NewUnpacker(a.r.Header(), runtime.GOMAXPROCS(0)); err != nil {
		return err
	}
	defer a.u.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	records := parallel + 4
	a.work, a.free = make(chan *stream.Record, records), make(chan *stream.Record, records)
	for range records {
		a.free <- &stream.Record{}
	}
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for rec := range a.work {
				if ctx.Err() == nil {
					if err := a.write(ctx, rec); err != nil {
						cancel(err)
					}
				}
				a.free <- rec
			}
		})
	}
	err = a.read(ctx, records)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err != nil {
		cancel(err) // what waits is not written any more
	}
	close(a.work)
	wg.Wait()
	if err == nil {
		err = context.Cause(ctx)
	}
	return err
}

// read hands out the records, and waits for all of a round before the next.
func (a *applier) read(ctx context.Context, records int) error {
	a.rounds = 1
	for {
		var rec *stream.Record
		select {
		case rec = <-a.free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		ev, err := a.r.Next(rec)
		if err != nil {
			return err
		}
		if ev == stream.GotBlocks {
			a.work <- rec
			continue
		}
		a.free <- rec
		if err := a.wait(ctx, records); err != nil || ev == stream.GotEnd {
			return err
		}
		a.rounds++
		a.m.target.sparse = false // there may be data now where zeros come
		if err := a.m.round(a.r.To()); err != nil {
			return err
		}
	}
}

// wait returns when every record is written.
func (a *applier) wait(ctx context.Context, records int) error {
	var all []*stream.Record
	for len(all) < records {
		select {
		case rec := <-a.free:
			all = append(all, rec)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for _, rec := range all {
		a.free <- rec
	}
	return context.Cause(ctx)
}

// write applies one record.
func (a *applier) write(ctx context.Context, rec *stream.Record) error {
	b, err := a.u.Unpack(rec)
	if err != nil {
		return err
	}
	t, size := a.m.target, a.r.Header().Size
	off, data := b.Offset, b.Data
	pick, blocks := int64(-1), int64(0)
	for _, run := range b.Runs {
		e := kernel.Extent{Offset: off, Length: run.Length}
		off += run.Length
		if run.Kind == stream.Unchanged {
			continue
		}
		whole := run.Length / kernel.BlockSize * kernel.BlockSize
		var p []byte
		if run.Kind == stream.Data {
			p, data = data[:run.Length], data[run.Length:]
			blocks += kernel.BlocksOf(run.Length)
			if i := rand.Int64N(blocks); i < kernel.BlocksOf(run.Length) {
				pick = e.Offset + i*kernel.BlockSize
			}
		}
		if whole < run.Length {
			a.keepTail(p, run.Length-whole)
		}
		if whole == 0 {
			continue
		}
		if run.Kind == stream.Data {
			if err := t.write(p[:whole], e.Offset); err != nil {
				return err
			}
			a.written.Add(whole)
			continue
		}
		if err := a.zero(ctx, kernel.Extent{Offset: e.Offset, Length: whole}); err != nil {
			return err
		}
	}
	if pick >= 0 && pick < size {
		a.sample.offer(pick)
	}
	a.told.add(b.Length())
	return nil
}

// zero zeroes in slices, so that an interruption is heard.
func (a *applier) zero(ctx context.Context, e kernel.Extent) error {
	for e.Length > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(e.Length, zeroSlice-e.Offset%zeroSlice)
		if err := a.m.target.zero(ctx, kernel.Extent{Offset: e.Offset, Length: n}); err != nil {
			return err
		}
		a.zeroed.Add(n)
		e.Offset, e.Length = e.Offset+n, e.Length-n
	}
	return nil
}

// keepTail keeps the last n bytes of data, or n zeros if there are none.
func (a *applier) keepTail(data []byte, n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tail = make([]byte, n)
	if data != nil {
		copy(a.tail, data[int64(len(data))-n:])
	}
}
