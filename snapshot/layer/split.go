// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"github.com/restic/chunker"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/rabin"
)

const (
	// longRun is the length from which a run is worth content-defined
	// chunking: the least that restic's chunker cuts.
	longRun = chunker.MinSize
	// gatherSize is the size of blobs of scattered blocks. 1 MiB compresses
	// nearly as well as anything larger.
	gatherSize = 1 << 20
	// longZeros is the length of zeros that ends a run. Shorter stretches
	// stay inside its chunks, so that these equal the chunks that restic
	// makes of an image of the device; no extent points at them. A longer one
	// is worth the chunk or two around it that then differ from restic's.
	longZeros = 64 << 10
)

// splitter turns blocks in device order into blobs and extents. A run is a
// stretch of the device without gaps and without long zeros. Runs of longRun
// bytes and more are chunked; the blocks of shorter ones are gathered.
type splitter struct {
	part *part
	emit func(*blob, []byte) error // hands a finished blob to the workers
	room func(n int) []byte        // an empty buffer for a blob of about n bytes
	roll func(end int64) error     // closes the part at end
	// age is that of what was at off before this, and how many bytes from there on, n at
	// most, have the same.
	age func(off, n int64) (length int64, age Age, err error)
	pol chunker.Pol
	cut *rabin.Chunker // made for the first long run; most small backups have none

	next  int64 // the device offset behind the run
	zeros int64 // bytes of zeros at the run's end, not yet part of it
	long  bool  // the run is being chunked

	short       []byte // the bytes of a run that is not long yet, zeros included
	shortRanges []shortRange
	shortSums   []uint64

	run       *blob // the long run's first blob
	runBytes  int64 // in the run so far
	chunk     []byte
	chunkBlob *blob

	// Blocks that are written often die soon: apart from the others, they leave few blobs
	// behind of which little is live.
	gathers [ages]gather
}

// gather is a blob of scattered blocks in the making.
type gather struct {
	data []byte
	blob *blob
}

// shortRange is a stretch of a short run: zeros or data.
type shortRange struct {
	length int64
	zero   bool
}

// data adds the content of blocks at off, none of them all zeros.
func (s *splitter) data(off int64, b []byte, sums []uint64) error {
	if off != s.next {
		if err := s.endRun(); err != nil {
			return err
		}
		s.next = off
	}
	if err := s.takeZeros(); err != nil {
		return err
	}
	s.next = off + int64(len(b))
	if !s.long && len(s.short)+len(b) < longRun {
		s.short = append(s.short, b...)
		s.shortSums = append(s.shortSums, sums...)
		s.shortRange(int64(len(b)), false)
		return nil
	}
	if err := s.lengthen(off); err != nil {
		return err
	}
	s.part.sums = appendSums(s.part.sums, sums)
	return s.feed(off, b, false)
}

// zero adds zeros.
func (s *splitter) zero(off, length int64) error {
	if off != s.next {
		if err := s.endRun(); err != nil {
			return err
		}
		s.next = off
	}
	s.zeros += length
	s.next += length
	if s.zeros >= longZeros {
		return s.endRun()
	}
	return nil
}

// takeZeros makes the zeros at the run's end a part of it, since data follow.
// At a run's very start there is nothing to bridge.
func (s *splitter) takeZeros() error {
	n, off := s.zeros, s.next-s.zeros
	if n == 0 {
		return nil
	}
	s.zeros = 0
	if s.long {
		return s.feed(off, make([]byte, n), true)
	}
	if len(s.short) == 0 {
		s.part.extent(extent{off: off, length: n, zero: true})
		return nil
	}
	s.short = append(s.short, make([]byte, n)...)
	s.shortRange(n, true)
	if len(s.short) >= longRun {
		return s.lengthen(s.next)
	}
	return nil
}

func (s *splitter) shortRange(n int64, zero bool) {
	if k := len(s.shortRanges); k > 0 && s.shortRanges[k-1].zero == zero {
		s.shortRanges[k-1].length += n
		return
	}
	s.shortRanges = append(s.shortRanges, shortRange{n, zero})
}

// lengthen turns a short run that ends at end into a long one.
func (s *splitter) lengthen(end int64) error {
	if s.long {
		return nil
	}
	s.long = true
	if s.cut == nil {
		s.cut = rabin.New(s.pol)
	}
	s.cut.Reset()
	s.startChunk()
	s.run, s.runBytes = s.chunkBlob, 0
	off, b := end-int64(len(s.short)), s.short
	s.part.sums = appendSums(s.part.sums, s.shortSums)
	for _, r := range s.shortRanges {
		if err := s.feed(off, b[:r.length], r.zero); err != nil {
			return err
		}
		off, b = off+r.length, b[r.length:]
	}
	s.dropShort()
	return nil
}

func (s *splitter) dropShort() {
	s.short, s.shortRanges, s.shortSums = s.short[:0], s.shortRanges[:0], s.shortSums[:0]
}

func (s *splitter) startChunk() {
	s.chunkBlob, s.chunk = new(blob), s.room(maxSpare)
}

// feed chunks bytes of a long run.
func (s *splitter) feed(off int64, b []byte, zero bool) error {
	if zero {
		s.part.extent(extent{off: off, length: int64(len(b)), zero: true})
	} else {
		s.part.extent(extent{off: off, length: int64(len(b)), first: s.run, at: s.runBytes})
	}
	s.runBytes += int64(len(b))
	for len(b) > 0 {
		if s.chunkBlob == nil {
			s.startChunk()
		}
		n := s.cut.Next(b)
		if n < 0 {
			s.chunk = append(s.chunk, b...)
			return nil
		}
		s.chunk = append(s.chunk, b[:n]...)
		if err := s.part.add(s.chunkBlob, s.chunk, s.emit); err != nil {
			return err
		}
		s.chunkBlob, s.chunk = nil, nil
		b = b[n:]
	}
	return nil
}

// endRun ends the run, gathers it if it stayed short, and records the zeros
// behind it.
func (s *splitter) endRun() error {
	if err := s.cutRun(); err != nil {
		return err
	}
	if s.zeros > 0 {
		s.part.extent(extent{off: s.next - s.zeros, length: s.zeros, zero: true})
		s.zeros = 0
	}
	return nil
}

// cutRun ends the run before the zeros at its end.
func (s *splitter) cutRun() error {
	end := s.next - s.zeros
	if s.long {
		s.long = false
		var err error
		if s.chunkBlob != nil {
			err = s.part.add(s.chunkBlob, s.chunk, s.emit)
		}
		s.chunk, s.chunkBlob, s.run = nil, nil, nil
		return err
	}
	off, b := end-int64(len(s.short)), s.short
	s.part.sums = appendSums(s.part.sums, s.shortSums)
	for _, r := range s.shortRanges {
		if r.zero {
			s.part.extent(extent{off: off, length: r.length, zero: true})
		} else if err := s.gatherBlocks(off, b[:r.length]); err != nil {
			return err
		}
		off, b = off+r.length, b[r.length:]
	}
	s.dropShort()
	return nil
}

// gatherBlocks adds blocks of a short run to the open blobs of scattered ones.
func (s *splitter) gatherBlocks(off int64, b []byte) error {
	for len(b) > 0 {
		n, age, err := s.age(off, int64(len(b)))
		if err != nil {
			return err
		}
		if err := s.gatherInto(age, off, b[:n]); err != nil {
			return err
		}
		off, b = off+n, b[n:]
	}
	return nil
}

func (s *splitter) gatherInto(age Age, off int64, b []byte) error {
	g := &s.gathers[age]
	for len(b) > 0 {
		if g.blob == nil {
			g.blob, g.data = new(blob), s.room(gatherSize)
		}
		n := min(len(b), gatherSize-len(g.data))
		if n < len(b) {
			n = n / kernel.BlockSize * kernel.BlockSize
		}
		s.part.extent(extent{off: off, length: int64(n), first: g.blob, at: int64(len(g.data))})
		g.data = append(g.data, b[:n]...)
		off, b = off+int64(n), b[n:]
		if len(g.data) > gatherSize-kernel.BlockSize {
			if err := s.closeGather(g); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *splitter) closeGather(g *gather) error {
	if g.blob == nil {
		return nil
	}
	err := s.part.add(g.blob, g.data, s.emit)
	g.blob, g.data = nil, nil
	return err
}

// settle closes the part. It is called between pieces, so that a part always
// ends at a whole block.
func (s *splitter) settle() error {
	if err := s.finish(); err != nil {
		return err
	}
	return s.roll(s.next)
}

// finish puts everything that is open into the part.
func (s *splitter) finish() error {
	if err := s.endRun(); err != nil {
		return err
	}
	for i := range s.gathers {
		if err := s.closeGather(&s.gathers[i]); err != nil {
			return err
		}
	}
	return nil
}

func appendSums(l blocksum.List, sums []uint64) blocksum.List {
	for _, v := range sums {
		l = l.Append(v)
	}
	return l
}
