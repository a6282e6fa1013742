// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"fmt"
	"iter"
	"sort"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// holdPiece is how much of a long extent one read asks for.
const holdPiece = 512 << 10

// held is a part of a device's content in memory.
type held struct {
	extents []kernel.Extent
	at      []int64 // where each begins in buf
	buf     []byte
}

// hold reads ranges of a source, total bytes of whole blocks at most, with
// many reads in flight.
func hold(ctx context.Context, from layer.Source, ranges iter.Seq[kernel.Extent], total int64, parallel int) (*held, error) {
	if parallel <= 0 {
		parallel = 16
	}
	h := &held{buf: device.AlignedBuffer(int(total))}
	g, ctx := errgroup.WithContext(ctx)
	work := make(chan int)
	var at int64
	for e := range ranges {
		for e.Length > 0 {
			n := min(e.Length, holdPiece)
			h.extents, h.at = append(h.extents, kernel.Extent{Offset: e.Offset, Length: n}), append(h.at, at)
			at += kernel.BlocksOf(n) * kernel.BlockSize
			e.Offset, e.Length = e.Offset+n, e.Length-n
		}
	}
	for range min(parallel, len(h.extents)) {
		g.Go(func() error {
			for i := range work {
				e := h.extents[i]
				if err := from.ReadExtent(ctx, h.buf[h.at[i]:h.at[i]+e.Length], e.Offset); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(work)
		for i := range h.extents {
			select {
			case work <- i:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	return h, g.Wait()
}

// ReadExtent implements [layer.Source].
func (h *held) ReadExtent(_ context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		i := sort.Search(len(h.extents), func(i int) bool { return h.extents[i].End() > off })
		if i == len(h.extents) || h.extents[i].Offset > off {
			return fmt.Errorf("read what was held in memory: nothing was at %d", off)
		}
		e, skip := h.extents[i], off-h.extents[i].Offset
		n := copy(p, h.buf[h.at[i]+skip:h.at[i]+e.Length])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Buffer implements [layer.Source].
func (h *held) Buffer(n int) []byte { return make([]byte, n) }
