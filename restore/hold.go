// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// sliceBytes is how much of a window is written at a time, in the order of
// the device.
const sliceBytes = 32 << 20

// slicesAhead is how many slices are fetched at a time.
const slicesAhead = 4

// hold keeps blocks of blobs that are scattered over the device until the
// blocks before them are written, so that both are one write: else a few
// thousand small changes would cut a device's long runs into as many small
// writes.
type hold struct {
	mu     sync.Mutex
	pieces map[int64][]byte // by offset; whole blocks
	bytes  int
	limit  int
}

// scattered reports whether most of what lies between a blob's first and last
// byte on the device comes from elsewhere.
func scattered(n *need) bool {
	var sum int64
	for _, s := range n.segs {
		sum += s.length
	}
	first, last := n.segs[0], n.segs[len(n.segs)-1]
	return last.off+last.length-first.off > 2*sum
}

// put takes a copy of whole blocks, unless there is no room.
func (h *hold) put(off int64, data []byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes+len(data) > h.limit {
		return false
	}
	h.pieces[off] = slices.Clone(data)
	h.bytes += len(data)
	return true
}

// take gives up what begins at off, or nil.
func (h *hold) take(off int64) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	data := h.pieces[off]
	delete(h.pieces, off)
	h.bytes -= len(data)
	return data
}

// before gives up all that begins before end, in device order.
func (h *hold) before(end int64, fn func(off int64, data []byte) error) error {
	h.mu.Lock()
	var offsets []int64
	for off := range h.pieces {
		if off < end {
			offsets = append(offsets, off)
		}
	}
	h.mu.Unlock()
	slices.Sort(offsets)
	for _, off := range offsets {
		if err := fn(off, h.take(off)); err != nil {
			return err
		}
	}
	return nil
}

// holder is a sink that holds what it can, and passes on the rest.
type holder struct {
	*batcher
	hold *hold
}

func (h holder) blob(segs []segment, plain []byte) error {
	for _, s := range segs {
		data := plain[s.in : s.in+s.length]
		if s.off%kernel.BlockSize == 0 && s.length%kernel.BlockSize == 0 && h.hold.put(s.off, data) {
			continue
		}
		if err := h.segment(s.off, data); err != nil {
			return err
		}
	}
	return nil
}

// writeBlobs fetches and writes the data of a window. It goes through the
// blobs in the order in which the device needs them first: of every slice,
// what is scattered is fetched before the rest, as far as it can be held. Slices
// overlap, so that the store, the processors and the target need not wait for the
// last blob of one before they go on with the next.
func (r *restore) writeBlobs(ctx context.Context, w *window) error {
	h := &hold{pieces: map[int64][]byte{}, limit: r.limits.hold}
	cuts := w.slices()
	g, ctx := errgroup.WithContext(ctx)
	room := make(chan struct{}, slicesAhead)
	before := make(chan struct{}) // closed when all slices before this one are written
	close(before)
	for i, cut := range cuts {
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return g.Wait()
		}
		err := r.fetch.fetch(ctx, w, cut, scattered, func() sink { return holder{&batcher{ctx: ctx, w: r.w}, h} })
		if err != nil {
			g.Go(func() error { return err })
			return g.Wait()
		}
		end := w.runs[len(w.runs)-1].End()
		if i+1 < len(cuts) {
			end = cuts[i+1][0].segs[0].off
		}
		prior, written := before, make(chan struct{})
		before = written
		g.Go(func() error {
			err := r.fetch.fetch(ctx, w, cut, dense, func() sink { return &batcher{ctx: ctx, w: r.w, follow: h} })
			if err != nil {
				return err
			}
			select {
			case <-prior:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			rest := &batcher{ctx: ctx, w: r.w}
			if err := h.before(end, rest.put); err != nil {
				return err
			}
			close(written)
			<-room
			return rest.close()
		})
	}
	return g.Wait()
}

func dense(n *need) bool { return !scattered(n) }

// slices cuts the needs, which are in the order of the device, into stretches
// of about sliceBytes.
func (w *window) slices() (out [][]need) {
	from, sum := 0, int64(0)
	for i, n := range w.needs {
		for _, s := range n.segs {
			sum += s.length
		}
		if sum >= sliceBytes || i == len(w.needs)-1 {
			out = append(out, w.needs[from:i+1])
			from, sum = i+1, 0
		}
	}
	return out
}
