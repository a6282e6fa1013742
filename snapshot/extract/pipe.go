// SPDX-License-Identifier: BSD-2-Clause

package extract

import (
	"context"
	"sync"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

const (
	maxData = 512 << 10 // of one record
	// maxSpans keeps the runs of a record, one for each span and each block
	// read at most, below the format's bound.
	maxSpans = 1024
	// maxWorkers read and pack.
	maxWorkers = 16
)

// counts says what a round dealt with, in bytes.
type counts struct{ looked, read, data, zeros int64 }

// chunk becomes one record.
type chunk struct {
	seq    uint64
	offset int64
	spans  []span
	buf    []byte // of what is read
	length int64  // of that, in whole blocks
	reads  []device.Read
	sums   []uint64 // expected, of the blocks that are read, if key is set
	key    *blocksum.Key

	runs    []stream.Run
	scratch []byte
	raw     []byte // the record
	counts  counts
	err     error
	done    chan struct{}
}

func (c *chunk) reset(seq uint64, offset int64) {
	c.seq, c.offset, c.spans, c.length, c.sums, c.key = seq, offset, c.spans[:0], 0, c.sums[:0], nil
}

// pipe reads, packs and writes the records of one round: many are read and
// packed at a time, and they are written in order.
type pipe struct {
	from     device.Source
	w        *stream.Writer
	packer   *stream.Packer
	parallel int // reads in flight
	progress func(bytes int64)
	abort    func() // makes whatever waits for the target give up

	flight              *device.Flight
	free, work, ordered chan *chunk
}

// run sends a plan. The device is read no more once read is called, if it is
// set; its error ends the round.
func (p *pipe) run(ctx context.Context, spans plan, read func() error) (total counts, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(ctx, p.abort)
	workers := min(p.parallel, maxWorkers)
	p.flight = device.NewFlight(p.from, p.parallel)
	chunks := 2 * workers
	p.free, p.work, p.ordered = make(chan *chunk, chunks), make(chan *chunk, chunks), make(chan *chunk, chunks)
	for range chunks {
		p.free <- &chunk{done: make(chan struct{}, 1)}
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	var reads sync.WaitGroup // of what is cut
	for range workers {
		wg.Go(func() {
			for c := range p.work {
				if c.err = p.fill(ctx, c); c.err != nil {
					cancel(c.err)
				}
				reads.Done()
				if c.err == nil {
					c.err = p.pack(c)
				}
				c.done <- struct{}{}
			}
		})
	}
	first := p.w.Next()
	wg.Go(func() {
		defer close(p.ordered)
		err := p.cut(ctx, spans, first, &reads)
		close(p.work)
		if err == nil && read != nil {
			if reads.Wait(); ctx.Err() == nil {
				err = read()
			}
		}
		if err != nil {
			cancel(err)
		}
	})
	for c := range p.ordered {
		select {
		case <-c.done:
		case <-ctx.Done():
			return total, context.Cause(ctx)
		}
		if c.err == nil {
			c.err = p.w.Put(c.raw)
		}
		if c.err != nil {
			return total, c.err
		}
		total.looked += c.counts.looked
		total.read += c.counts.read
		total.data += c.counts.data
		total.zeros += c.counts.zeros
		p.progress(c.counts.looked)
		p.free <- c
	}
	if err = context.Cause(ctx); err == nil {
		stop()
	}
	return total, err
}

// cut makes chunks of the spans.
func (p *pipe) cut(ctx context.Context, spans plan, seq uint64, reads *sync.WaitGroup) error {
	var c *chunk
	send := func() {
		reads.Add(1)
		p.work <- c
		p.ordered <- c
		c, seq = nil, seq+1
	}
	for s, err := range spans {
		if err != nil {
			return err
		}
		for s.Length > 0 {
			if c == nil {
				select {
				case c = <-p.free:
					c.reset(seq, s.Offset)
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			part := s
			if part.what == toRead {
				part.Length = min(part.Length, maxData-c.length)
				blocks := kernel.BlocksOf(part.Length)
				if part.expect != nil {
					c.key = part.key
					c.sums = append(c.sums, part.expect[:blocks]...)
					s.expect = s.expect[blocks:]
				}
				c.length += blocks * kernel.BlockSize
			}
			c.spans = append(c.spans, part)
			s.Offset, s.Length = part.End(), s.Length-part.Length
			if c.length == maxData || len(c.spans) == maxSpans {
				send()
			}
		}
	}
	if c != nil {
		send()
	}
	return nil
}

// fill reads what is to be read.
func (p *pipe) fill(ctx context.Context, c *chunk) error {
	if c.length == 0 {
		return nil
	}
	if c.buf == nil {
		c.buf = p.from.Buffer(maxData)
	}
	c.reads = c.reads[:0]
	at := int64(0)
	for _, s := range c.spans {
		if s.what == toRead {
			c.reads = append(c.reads, device.Read{Offset: s.Offset, Into: c.buf[at : at+s.Length]})
			at += kernel.BlocksOf(s.Length) * kernel.BlockSize
		}
	}
	return p.flight.Read(ctx, c.reads)
}

// pack makes the record of what was read.
func (p *pipe) pack(c *chunk) (err error) {
	c.runs, c.counts = c.runs[:0], counts{}
	at, kept, block := int64(0), 0, 0
	for _, s := range c.spans {
		switch s.what {
		case skip:
			c.add(stream.Unchanged, s.Length)
			continue
		case zeros:
			c.add(stream.Zeros, s.Length)
			c.counts.looked += s.Length
			continue
		}
		c.counts.looked += s.Length
		c.counts.read += s.Length
		for left := s.Length; left > 0; {
			n := min(left, kernel.BlockSize)
			b := c.buf[at : at+n]
			kind := c.judge(b, block)
			if kind == stream.Data {
				// What is sent moves up to what is sent before it.
				if int64(kept) != at {
					copy(c.buf[kept:], b)
				}
				kept += int(n)
			}
			c.add(kind, n)
			at, left, block = at+kernel.BlockSize, left-n, block+1
		}
	}
	c.raw, c.scratch, err = p.packer.Pack(c.raw, c.scratch, c.seq, stream.Blocks{Offset: c.offset, Runs: c.runs, Data: c.buf[:kept]})
	return err
}

// judge says how the i-th block that was read is sent.
func (c *chunk) judge(b []byte, i int) stream.RunKind {
	zero := blocksum.IsZero(b)
	if c.key != nil {
		want := c.sums[i]
		if zero && want == zeroSum || !zero && want != zeroSum && c.key.Sum(b) == want {
			return stream.Unchanged
		}
	}
	if zero {
		return stream.Zeros
	}
	return stream.Data
}

func (c *chunk) add(kind stream.RunKind, n int64) {
	switch kind {
	case stream.Data:
		c.counts.data += n
	case stream.Zeros:
		c.counts.zeros += n
	}
	if k := len(c.runs); k > 0 && c.runs[k-1].Kind == kind {
		c.runs[k-1].Length += n
		return
	}
	c.runs = append(c.runs, stream.Run{Kind: kind, Length: n})
}
