// SPDX-License-Identifier: BSD-2-Clause

package extract

import (
	"fmt"
	"io"
	"iter"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// what says how a span of the device is dealt with.
type what uint8

const (
	toRead what = iota // read it, and send it unless the target has it
	zeros              // known to be zeros
	skip               // known to be what the target has
)

// span is a range of whole blocks; the device's last may be short.
type span struct {
	kernel.Extent
	what what
	// expect are the sums of the target's blocks, zeroSum for zeros, if they
	// are to be compared. It is valid until the next span.
	expect []uint64
	key    *blocksum.Key
}

// plan is spans in device order, without a gap, for the whole device. The error
// of the last says why it could not be made.
type plan iter.Seq2[span, error]

// zeroSum stands for a block of zeros. Data with this sum counts as differing.
const zeroSum = 0

func ofBitmap(b *kernel.Bitmap, size int64) plan {
	return func(yield func(span, error) bool) {
		for pos := int64(0); pos < size; {
			i := pos / kernel.BlockSize
			w, end := skip, b.NextSet(i)
			if end == i {
				w, end = toRead, b.NextClear(i)
			}
			e := kernel.Extent{Offset: pos, Length: min(end*kernel.BlockSize, size) - pos}
			if !yield(span{Extent: e, what: w}, nil) {
				return
			}
			pos = e.End()
		}
	}
}

func dirtyBytes(b *kernel.Bitmap, size int64) int64 {
	return min(b.Count()*kernel.BlockSize, size)
}

// ofExtents takes what lies between the extents for zeros.
func ofExtents(data []kernel.Extent, size int64) plan {
	return func(yield func(span, error) bool) {
		pos := int64(0)
		for _, e := range append(data, kernel.Extent{Offset: size}) {
			if e.Offset > pos && !yield(span{Extent: kernel.Extent{Offset: pos, Length: e.Offset - pos}, what: zeros}, nil) {
				return
			}
			if e.Length > 0 && !yield(span{Extent: e}, nil) {
				return
			}
			pos = e.End()
		}
	}
}

// sums reads the target's sums.
type sums struct {
	r    *stream.Reader
	u    *stream.Unpacker
	key  blocksum.Key
	rec  stream.Record
	runs []stream.Run // what is left of the record
	data []byte
}

func newSums(r io.Reader, size int64) (*sums, error) {
	sr, err := stream.NewReader(r)
	if err != nil {
		return nil, err
	}
	h := sr.Header()
	if h.Kind != stream.Sums {
		return nil, fmt.Errorf("it holds no sums but a stream (%v): make one with `merge --sums TARGET`", h.Kind)
	}
	if h.Size != size {
		return nil, fmt.Errorf("they are of a device of %d bytes, and this one has %d: make them with `merge --sums --size %d TARGET`", h.Size, size, size)
	}
	u, err := stream.NewUnpacker(h, 1)
	if err != nil {
		return nil, err
	}
	return &sums{r: sr, u: u, key: blocksum.Key(h.ID)}, nil
}

func (s *sums) id() stream.ID { return s.r.Header().ID }

// run gives the next run of sums, of at most limit bytes of the device; its
// data are nil for zeros.
func (s *sums) run(limit int64) (n int64, data []byte, err error) {
	for len(s.runs) == 0 {
		ev, err := s.r.Next(&s.rec)
		if err != nil {
			return 0, nil, err
		}
		if ev != stream.GotBlocks {
			return 0, nil, fmt.Errorf("%w: the sums end early", stream.ErrDamaged)
		}
		b, err := s.u.Unpack(&s.rec)
		if err != nil {
			return 0, nil, err
		}
		s.runs, s.data = b.Runs, b.Data
	}
	r := &s.runs[0]
	if n = min(r.Length, limit); n < r.Length {
		n = n / kernel.BlockSize * kernel.BlockSize // limit is whole blocks, or the device's end
	}
	switch r.Kind {
	case stream.Data:
		k := kernel.BlocksOf(n) * blocksum.Size
		data, s.data = s.data[:k], s.data[k:]
	case stream.Zeros:
	default:
		return 0, nil, fmt.Errorf("%w: sums that were left out", stream.ErrDamaged)
	}
	if r.Length -= n; r.Length == 0 {
		s.runs = s.runs[1:]
	}
	return n, data, nil
}

// end makes sure that the sums were whole.
func (s *sums) end() error {
	defer s.u.Close()
	if len(s.runs) > 0 {
		return fmt.Errorf("%w: there are more sums than blocks", stream.ErrDamaged)
	}
	ev, err := s.r.Next(&s.rec)
	if err == nil && ev != stream.GotEnd {
		err = fmt.Errorf("%w: there are more sums than blocks", stream.ErrDamaged)
	}
	return err
}

// against adds what the target has to a plan. Where both hold zeros nothing is
// left to do.
func against(p plan, s *sums) plan {
	return func(yield func(span, error) bool) {
		expect := make([]uint64, maxData/kernel.BlockSize)
		for sp, err := range p {
			for err == nil && sp.Length > 0 {
				limit := sp.Length
				if sp.what == toRead {
					limit = min(limit, maxData)
				}
				n, data, readErr := s.run(limit)
				if readErr != nil {
					yield(span{}, fmt.Errorf("read the target's sums: %w", readErr))
					return
				}
				out := span{Extent: kernel.Extent{Offset: sp.Offset, Length: n}, what: sp.what}
				switch {
				case sp.what == zeros && data == nil:
					out.what = skip
				case sp.what == toRead:
					out.key, out.expect = &s.key, expect[:kernel.BlocksOf(n)]
					clear(out.expect)
					for i := range len(data) / blocksum.Size {
						out.expect[i] = blocksum.List(data).At(int64(i))
					}
				}
				if !yield(out, nil) {
					return
				}
				sp.Offset, sp.Length = sp.Offset+n, sp.Length-n
			}
		}
		if err := s.end(); err != nil {
			yield(span{}, fmt.Errorf("read the target's sums: %w", err))
		}
	}
}
