// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"fmt"
	"sync"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

const (
	chunkBytes  = 1 << 20 // read at a time
	chunkBlocks = chunkBytes / kernel.BlockSize
)

// scan reads the first size bytes of a device once, with many reads in flight,
// and compares them with what is expected.
type scan struct {
	device   *device.Device
	size     int64
	key      *blocksum.Key
	expected layer.Expected
	parallel int
	// found is called with every range in device order: the same as
	// expected, or not. Neighbours need not be joined.
	found func(e kernel.Extent, same bool) error

	work, ordered, free chan *chunk
}

// chunk is a range that is read, or a hole, which reads as zeros.
type chunk struct {
	kernel.Extent
	hole bool
	buf  []byte
	sums [chunkBlocks]uint64
	zero [chunkBlocks]bool
	err  error
	done chan struct{}
}

// run ends when all is compared, with the first error, or with ctx.
func (s *scan) run(ctx context.Context) error {
	data, err := s.device.DataExtents(ctx)
	if err != nil {
		return err
	}
	if s.parallel <= 0 {
		s.parallel = defaultWriters
	}
	chunks := 2 * s.parallel
	s.work, s.ordered, s.free = make(chan *chunk, chunks), make(chan *chunk, chunks), make(chan *chunk, chunks)
	for range chunks {
		s.free <- &chunk{buf: device.AlignedBuffer(chunkBytes), done: make(chan struct{}, 1)}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for range s.parallel {
		wg.Go(func() {
			for c := range s.work {
				c.err = s.read(ctx, c)
				c.done <- struct{}{}
			}
		})
	}
	wg.Go(func() {
		defer close(s.ordered)
		defer close(s.work)
		s.cut(ctx, data)
	})
	for c := range s.ordered {
		if err := s.compare(ctx, c); err != nil {
			return err
		}
		s.free <- c
	}
	return context.Cause(ctx)
}

// cut makes chunks of the device: data, and the holes between them.
func (s *scan) cut(ctx context.Context, data []kernel.Extent) {
	pos := int64(0)
	for _, e := range append(data, kernel.Extent{Offset: s.size}) {
		if e.Offset = min(e.Offset, s.size); e.Offset > pos && !s.send(ctx, kernel.Extent{Offset: pos, Length: e.Offset - pos}, true) {
			return
		}
		for pos = max(pos, e.Offset); pos < min(e.End(), s.size); {
			n := min(chunkBytes, min(e.End(), s.size)-pos)
			if !s.send(ctx, kernel.Extent{Offset: pos, Length: n}, false) {
				return
			}
			pos += n
		}
	}
}

func (s *scan) send(ctx context.Context, e kernel.Extent, hole bool) bool {
	select {
	case c := <-s.free:
		c.Extent, c.hole = e, hole
		s.work <- c
		s.ordered <- c
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *scan) read(ctx context.Context, c *chunk) error {
	if c.hole {
		return nil
	}
	buf := c.buf[:c.Length]
	if err := s.device.ReadExtent(ctx, buf, c.Offset); err != nil {
		return err
	}
	for i := 0; len(buf) > 0; i++ {
		block := buf[:min(kernel.BlockSize, len(buf))]
		if c.zero[i] = blocksum.IsZero(block); !c.zero[i] {
			c.sums[i] = s.key.Sum(block)
		}
		buf = buf[len(block):]
	}
	return nil
}

// compare asks about a chunk that has been read.
func (s *scan) compare(ctx context.Context, c *chunk) error {
	select {
	case <-c.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if c.err != nil {
		return fmt.Errorf("compare: %w", c.err)
	}
	for e := c.Extent; e.Length > 0; {
		n, same, err := s.stretch(c, e)
		if err != nil {
			return fmt.Errorf("compare: %w", err)
		}
		if err := s.found(kernel.Extent{Offset: e.Offset, Length: n}, same); err != nil {
			return err
		}
		e.Offset, e.Length = e.Offset+n, e.Length-n
	}
	return nil
}

// stretch is how many bytes from the start of e on, the rest of a chunk, are
// all as expected or all not.
func (s *scan) stretch(c *chunk, e kernel.Extent) (n int64, same bool, err error) {
	if c.hole {
		return s.expected.Zeros(e)
	}
	for n < e.Length {
		i := (e.Offset + n - c.Offset) / kernel.BlockSize
		now, err := s.expected.Same(e.Offset+n, c.zero[i], c.sums[i])
		if err != nil || n > 0 && now != same {
			return n, same, err
		}
		same = now
		n = min(n+kernel.BlockSize, e.Length)
	}
	return n, same, nil
}
