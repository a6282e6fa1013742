// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

const (
	pieceBytes   = 512 << 10 // of one piece's buffer
	pieceExtents = 64        // small reads that one goroutine does at a time
	maxReaders   = 16        // goroutines that read
)

// Range is a range of the device to back up, made of whole blocks but for the
// device's last. A hole is known to hold zeros and is not read.
type Range struct {
	kernel.Extent
	Hole bool
}

// piece is a batch of neighbouring ranges, read by one goroutine. Data of a
// range that is no hole starts at the next whole block of buf.
type piece struct {
	ranges []Range
	buf    []byte
	used   int
	reads  []device.Read
	sums   []uint64 // of each block in buf
	zero   []bool
	err    error
	done   chan struct{}
}

// reader reads pieces ahead, many at once, and hands them out in order.
type reader struct {
	flight  *device.Flight
	key     *blocksum.Key
	free    chan *piece
	ordered chan *piece
	work    chan *piece
	bytes   atomic.Int64
	wg      sync.WaitGroup
}

// startReader reads ranges with up to parallel reads in flight until the
// sequence or ctx ends. The pieces' memory is all that it takes.
func startReader(ctx context.Context, src device.Source, key *blocksum.Key, ranges iter.Seq[Range], parallel int) *reader {
	readers := min(parallel, maxReaders)
	pieces := 2 * readers
	r := &reader{
		flight:  device.NewFlight(src, parallel),
		key:     key,
		free:    make(chan *piece, pieces),
		ordered: make(chan *piece, pieces),
		work:    make(chan *piece, pieces),
	}
	for range pieces {
		r.free <- &piece{
			buf: src.Buffer(pieceBytes), done: make(chan struct{}, 1),
			sums: make([]uint64, pieceBytes/kernel.BlockSize), zero: make([]bool, pieceBytes/kernel.BlockSize),
		}
	}
	for range readers {
		r.wg.Go(func() {
			for p := range r.work {
				p.err = r.read(ctx, p)
				p.done <- struct{}{}
			}
		})
	}
	r.wg.Go(func() {
		defer close(r.ordered)
		defer close(r.work)
		r.cut(ctx, ranges)
	})
	return r
}

// cut makes pieces of the ranges.
func (r *reader) cut(ctx context.Context, ranges iter.Seq[Range]) {
	var p *piece
	send := func() {
		r.work <- p
		r.ordered <- p
		p = nil
	}
	for rg := range ranges {
		for rg.Length > 0 {
			if p == nil {
				select {
				case p = <-r.free:
					p.ranges, p.used = p.ranges[:0], 0
				case <-ctx.Done():
					return
				}
			}
			part := rg
			if !rg.Hole {
				part.Length = min(part.Length, int64(pieceBytes-p.used))
				p.used += int(kernel.BlocksOf(part.Length)) * kernel.BlockSize
			}
			p.ranges = append(p.ranges, part)
			rg.Offset, rg.Length = part.End(), rg.Length-part.Length
			if p.used == pieceBytes || len(p.ranges) == pieceExtents {
				send()
			}
		}
	}
	if p != nil {
		send()
	}
}

func (r *reader) read(ctx context.Context, p *piece) error {
	p.reads = p.reads[:0]
	at := 0
	for _, rg := range p.ranges {
		if !rg.Hole {
			p.reads = append(p.reads, device.Read{Offset: rg.Offset, Into: p.buf[at : at+int(rg.Length)]})
			at += int(kernel.BlocksOf(rg.Length)) * kernel.BlockSize
		}
	}
	if err := r.flight.Read(ctx, p.reads); err != nil {
		return err
	}
	i := 0
	for _, read := range p.reads {
		r.bytes.Add(int64(len(read.Into)))
		for buf := read.Into; len(buf) > 0; i++ {
			block := buf[:min(kernel.BlockSize, len(buf))]
			buf = buf[len(block):]
			if p.zero[i] = blocksum.IsZero(block); !p.zero[i] {
				p.sums[i] = r.key.Sum(block)
			}
		}
	}
	return nil
}

// each calls fn with every piece, in order; the piece is reused after fn.
func (r *reader) each(ctx context.Context, fn func(*piece) error) error {
	for p := range r.ordered {
		select {
		case <-p.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if p.err != nil {
			return p.err
		}
		if err := fn(p); err != nil {
			return err
		}
		r.free <- p
	}
	return context.Cause(ctx)
}
