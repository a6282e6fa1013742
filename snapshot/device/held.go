// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"sort"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/kernel"
)

const (
	holdPiece = 512 << 10 // of a long extent that one read asks for
	holdBatch = 256       // reads that are asked for together
)

// Held is a part of a device's content in memory. It is a [Source] of that.
type Held struct {
	extents []kernel.Extent
	at      []int64 // where each begins in buf
	buf     []byte
}

// Hold reads ranges of a source, total bytes of whole blocks at most, with up to parallel
// reads in flight.
func Hold(ctx context.Context, from Source, ranges iter.Seq[kernel.Extent], total int64, parallel int) (*Held, error) {
	h := &Held{buf: from.Buffer(int(total))}
	var reads []Read
	var at int64
	for e := range ranges {
		for e.Length > 0 {
			n := min(e.Length, holdPiece)
			h.extents, h.at = append(h.extents, kernel.Extent{Offset: e.Offset, Length: n}), append(h.at, at)
			reads = append(reads, Read{Offset: e.Offset, Into: h.buf[at : at+n]})
			at += kernel.BlocksOf(n) * kernel.BlockSize
			e.Offset, e.Length = e.Offset+n, e.Length-n
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	flight := NewFlight(from, parallel)
	for batch := range slices.Chunk(reads, holdBatch) {
		g.Go(func() error { return flight.Read(ctx, batch) })
	}
	return h, g.Wait()
}

// ReadExtents implements [Source].
func (h *Held) ReadExtents(_ context.Context, reads []Read, _ int) error {
	for _, r := range reads {
		if err := h.read(r.Into, r.Offset); err != nil {
			return err
		}
	}
	return nil
}

func (h *Held) read(p []byte, off int64) error {
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

// Buffer implements [Source].
func (h *Held) Buffer(n int) []byte { return make([]byte, n) }
