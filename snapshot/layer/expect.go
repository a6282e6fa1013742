// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
)

// Expected knows what the blocks of a device should be. It is asked in device
// order, from one goroutine; it may be asked twice about a block.
type Expected interface {
	// Same reports whether the block at off is as expected: zeros, or data
	// with this sum.
	Same(off int64, zero bool, sum uint64) (bool, error)
	// Zeros reports for how many bytes from e's start on zeros are, or are
	// not, as expected.
	Zeros(e kernel.Extent) (n int64, same bool, err error)
}

// Sums is the Expected of a chain of layers. It fetches the chain's indexes
// and sums, never its data.
type Sums struct {
	ctx   context.Context //nolint:containedctx // an iterator's, used only while one Write runs
	m     *Merger
	piece Piece
	// Damaged, if set, tells errors by which sums are lost. What these are sums of is
	// then never as expected, and neither is what cannot be read of the layers.
	Damaged func(error) bool
}

// NewSums expects what the layers hold of a device that had before bytes and
// has now bytes. What lies behind either, or in no layer, is never as
// expected, and neither is a last block that was short and no longer is.
func NewSums(ctx context.Context, from Loader, layers []*Layer, before, now int64) *Sums {
	size := before
	if before != now {
		size = min(before, now) / kernel.BlockSize * kernel.BlockSize
	}
	return &Sums{ctx: ctx, m: NewMerger(from, layers, size)}
}

// seek finds the piece that holds off; beyond the device's end it is missing.
func (s *Sums) seek(off int64) error {
	for s.piece.End() <= off {
		if s.m.pos >= s.m.size {
			s.piece = Piece{Offset: s.piece.End(), Length: 1<<62 - s.piece.End(), Missing: true}
			return nil
		}
		var err error
		if s.piece, err = s.m.Next(s.ctx); err == nil && s.Damaged == nil {
			err = s.piece.Lost
		}
		if err != nil {
			return fmt.Errorf("read sums: %w", err)
		}
	}
	return nil
}

// Same implements Expected.
func (s *Sums) Same(off int64, zero bool, sum uint64) (bool, error) {
	if err := s.seek(off); err != nil {
		return false, err
	}
	p := &s.piece
	if p.Missing || p.Zero || zero {
		return zero && p.Zero && !p.Missing, nil
	}
	want, err := s.sum(p, p.Sum+(off-p.Offset)/kernel.BlockSize)
	if err != nil && s.Damaged != nil && s.Damaged(err) {
		return false, nil
	}
	return want == sum && err == nil, err
}

// Zeros implements Expected.
func (s *Sums) Zeros(e kernel.Extent) (int64, bool, error) {
	if err := s.seek(e.Offset); err != nil {
		return 0, false, err
	}
	return min(e.Length, s.piece.End()-e.Offset), s.piece.Zero, nil
}

// sum loads the i-th sum of the piece's part.
func (s *Sums) sum(p *Piece, i int64) (uint64, error) {
	b, err := p.sums(s.ctx, s.m.from, i*blocksum.Size)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

// sums loads the sums file of the piece's part from off on, as far as one of
// its blobs goes; that is one sum at least. The last blob is kept.
func (p *Piece) sums(ctx context.Context, from Loader, off int64) ([]byte, error) {
	c := p.cursor
	if c.sumsPart != p.Part || off < c.sumsFrom || off >= c.sumsFrom+int64(len(c.sums)) {
		if p.Part.noSums != nil {
			return nil, fmt.Errorf("part at %d has no sums: %w", p.Part.Index.Start, p.Part.noSums)
		}
		if len(p.Part.sums.Blobs) == 0 {
			return nil, fmt.Errorf("%w: part at %d has no sums", ErrDamaged, p.Part.Index.Start)
		}
		if c.sumsErr != nil && c.sumsPart == p.Part && off >= c.sumsFrom && off < c.sumsEnd {
			return nil, c.sumsErr // it need not be asked for once for each sum
		}
		blob, in, left := p.Part.sums.Locate(off)
		b, err := from.LoadMeta(ctx, p.Part.sums.Blobs[blob])
		if err != nil {
			c.sums, c.sumsPart, c.sumsFrom, c.sumsEnd = nil, p.Part, off-in, off+left
			c.sumsErr = fmt.Errorf("read sums: %w", err)
			return nil, c.sumsErr
		}
		if left < blocksum.Size || int64(len(b)) < in+blocksum.Size {
			return nil, fmt.Errorf("%w: sums of part at %d are cut", ErrDamaged, p.Part.Index.Start)
		}
		c.sums, c.sumsPart, c.sumsFrom, c.sumsErr = b, p.Part, off-in, nil
	}
	return c.sums[off-c.sumsFrom:], nil
}
