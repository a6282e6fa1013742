// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"context"
	"errors"
	"io"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

// sumsRecord is how many sums one record holds at most: those of 32 MiB, so
// that who reads them can soon begin.
const sumsRecord = 8192

// sumWriter makes a stream of what a scan finds. It is the Expected of a scan to
// which everything is as expected.
type sumWriter struct {
	ctx    context.Context //nolint:containedctx // of one scan
	w      *stream.Writer
	packer *stream.Packer
	size   int64
	at     int64 // of the record
	b      stream.Blocks
	sums   blocksum.List
	raw    []byte
	spare  []byte
}

// writeSums reads the target, nil if there is none, and writes the sums of its
// blocks.
func (m *Merge) writeSums(ctx context.Context, out io.Writer, h stream.Header, d *device.Device) error {
	w, err := stream.NewWriter(out, h)
	if err != nil {
		return err
	}
	s := &sumWriter{ctx: ctx, w: w, packer: stream.NewPacker(h, nil), size: h.Size}
	if d == nil {
		_, _, err = s.Zeros(kernel.Extent{Length: h.Size})
	} else {
		told := newProgress(PhaseComparing, h.Size, m.o.Progress)
		key := blocksum.Key(h.ID)
		c := &scan{
			device: d, size: h.Size, key: &key, expected: s, parallel: m.o.Parallel,
			found: func(e kernel.Extent, _ bool) error {
				told.add(e.Length)
				return nil
			},
		}
		err = c.run(ctx)
	}
	if err == nil {
		err = s.flush()
	}
	if err == nil {
		return w.Close()
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return errors.Join(err, w.Abort(err))
}

// Same implements layer.Expected.
func (s *sumWriter) Same(off int64, zero bool, sum uint64) (bool, error) {
	kind := stream.Zeros
	if !zero {
		kind = stream.Data
		sum = max(sum, 1) // 0 stands for zeros; this block is sent once too often
		s.sums = s.sums.Append(sum)
	}
	return true, s.add(kind, min(off/kernel.BlockSize*kernel.BlockSize+kernel.BlockSize, s.size))
}

// Zeros implements layer.Expected.
func (s *sumWriter) Zeros(e kernel.Extent) (int64, bool, error) {
	return e.Length, true, s.add(stream.Zeros, e.End())
}

// add brings the record up to the whole block that ends at end, or to the end of
// the device. A target that is shorter may end within a block, which then
// counts with the zeros behind it.
func (s *sumWriter) add(kind stream.RunKind, end int64) error {
	pos := s.at + s.b.Length()
	if end = min((end+kernel.BlockSize-1)/kernel.BlockSize*kernel.BlockSize, s.size); end <= pos {
		return s.ctx.Err()
	}
	if k := len(s.b.Runs); k > 0 && s.b.Runs[k-1].Kind == kind {
		s.b.Runs[k-1].Length += end - pos
	} else {
		s.b.Runs = append(s.b.Runs, stream.Run{Kind: kind, Length: end - pos})
	}
	if len(s.sums) >= sumsRecord*blocksum.Size || len(s.b.Runs) == stream.MaxRuns {
		return s.flush()
	}
	return nil
}

func (s *sumWriter) flush() (err error) {
	if len(s.b.Runs) == 0 {
		return nil
	}
	s.b.Offset, s.b.Data = s.at, s.sums
	s.raw, s.spare, err = s.packer.Pack(s.raw, s.spare, s.w.Next(), s.b)
	if err == nil {
		err = s.w.Put(s.raw)
	}
	s.at += s.b.Length()
	s.b.Runs, s.sums = s.b.Runs[:0], s.sums[:0]
	return err
}
