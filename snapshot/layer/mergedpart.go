// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
)

// leastSums is the length from which a blob of sums is worth to be listed as
// it is, and what is gathered before it to become a blob of its own.
const leastSums = metaBlob / 4

// mergedPart is a part in the making whose data are stored already. Its data
// file lists the blobs that it uses of one part after another, in the order
// that they have there: so a block that begins in one blob and ends in the
// next stays in one piece.
type mergedPart struct {
	extents []mergedExtent
	sources []*blobSource           // in the order of their first use
	open    map[*cursor]*blobSource // those that may be used again
	blobs   int                     // in all sources

	sums    blocksum.List // not in a blob yet
	sumBlob []repo.ID
	sumSize int64
}

// mergedExtent is an extent whose place in the data file is not known yet.
type mergedExtent struct {
	off, length int64
	source      *blobSource // nil for zeros
	blob        int         // where its data begin, in the source
	data        int64       // the same as an offset in the source's data file
}

// blobSource is a part of an input, as far as its blobs are used. It does not
// keep the part in memory.
type blobSource struct {
	part *Part // nil once the cursor has left it
	used map[int]usedBlob
}

type usedBlob struct {
	id          repo.ID
	start, size int64 // in the source's data file
	base        int64 // in the new one, once that is laid out
}

func newMergedPart() *mergedPart { return &mergedPart{open: map[*cursor]*blobSource{}} }

// source is where a piece's blobs are noted.
func (m *mergedPart) source(p Piece) *blobSource {
	s := m.open[p.cursor]
	if s != nil && s.part == p.Part {
		return s
	}
	if s != nil {
		s.part = nil
	}
	s = &blobSource{part: p.Part, used: map[int]usedBlob{}}
	m.open[p.cursor] = s
	m.sources = append(m.sources, s)
	return s
}

// joins reports whether a piece goes on where the last extent ends, on the
// device and in the data.
func (m *mergedPart) joins(p Piece) bool {
	if len(m.extents) == 0 {
		return false
	}
	last := m.extents[len(m.extents)-1]
	if last.off+last.length != p.Offset || (last.source == nil) != p.Zero {
		return false
	}
	return p.Zero || last.source == m.open[p.cursor] && last.source.part == p.Part && last.data+last.length == p.Data
}

// room is how much of a piece the part can take, in whole blocks or to the
// piece's end. An empty part takes something.
func (m *mergedPart) room(p Piece, maxBlobs, maxExtents int) int64 {
	if len(m.extents) >= maxExtents && !m.joins(p) {
		return 0
	}
	if p.Zero {
		return p.Length
	}
	var used map[int]usedBlob
	if s := m.open[p.cursor]; s != nil && s.part == p.Part {
		used = s.used
	}
	blobs, n := m.blobs, int64(0)
	for n < p.Length {
		blob, _, left := p.Part.Data.Locate(p.Data + n)
		if _, ok := used[blob]; !ok {
			if blobs >= maxBlobs {
				break
			}
			blobs++
		}
		n += left
	}
	if n >= p.Length {
		return p.Length
	}
	n = n / kernel.BlockSize * kernel.BlockSize
	if n == 0 && len(m.extents) == 0 {
		return min(p.Length, kernel.BlockSize)
	}
	return n
}

// add describes a piece behind the last one.
func (m *mergedPart) add(ctx context.Context, to Saver, from Loader, p Piece) error {
	joins := m.joins(p)
	e := mergedExtent{off: p.Offset, length: p.Length}
	if !p.Zero {
		s := m.source(p)
		e.source, e.data = s, p.Data
		for n := int64(0); n < p.Length; {
			blob, in, left := p.Part.Data.Locate(p.Data + n)
			if n == 0 {
				e.blob = blob
			}
			if _, ok := s.used[blob]; !ok {
				s.used[blob] = usedBlob{id: p.Part.Data.Blobs[blob], start: p.Data + n - in, size: in + left}
				m.blobs++
			}
			n += left
		}
		if err := m.addSums(ctx, to, from, p); err != nil {
			return err
		}
	}
	if joins {
		m.extents[len(m.extents)-1].length += p.Length
		return nil
	}
	m.extents = append(m.extents, e)
	return nil
}

// addSums takes over the sums of a piece; a whole blob of them by its name.
func (m *mergedPart) addSums(ctx context.Context, to Saver, from Loader, p Piece) error {
	off, left := p.Sum*blocksum.Size, kernel.BlocksOf(p.Length)*blocksum.Size
	for left > 0 {
		if blob, n, ok := p.wholeSums(off, left); ok && (len(m.sums) == 0 || len(m.sums) >= leastSums) {
			if err := m.saveSums(ctx, to, 1); err != nil {
				return err
			}
			m.sumBlob, m.sumSize = append(m.sumBlob, blob), m.sumSize+n
			off, left = off+n, left-n
			continue
		}
		b, err := p.sums(ctx, from, off)
		if err != nil {
			return err
		}
		n := min(left, int64(len(b))/blocksum.Size*blocksum.Size)
		m.sums = append(m.sums, b[:n]...)
		off, left = off+n, left-n
		if err := m.saveSums(ctx, to, metaBlob); err != nil {
			return err
		}
	}
	return nil
}

// wholeSums is the blob of sums that begins at off, if it is large, ends
// within n bytes, and holds whole sums.
func (p *Piece) wholeSums(off, n int64) (repo.ID, int64, bool) {
	f := &p.Part.sums
	if len(f.Blobs) == 0 {
		return repo.ID{}, 0, false
	}
	blob, in, size := f.Locate(off)
	return f.Blobs[blob], size, in == 0 && size <= n && size >= leastSums && size%blocksum.Size == 0
}

// saveSums stores what is gathered of the sums as far as it fills blobs of
// least bytes.
func (m *mergedPart) saveSums(ctx context.Context, to Saver, least int) error {
	for len(m.sums) >= least && len(m.sums) > 0 {
		n := min(len(m.sums), metaBlob)
		saved, err := to.SaveBlob(ctx, repo.KindMeta, m.sums[:n])
		if err != nil {
			return fmt.Errorf("save sums: %w", err)
		}
		m.sums = m.sums[:copy(m.sums, m.sums[n:])]
		m.sumBlob, m.sumSize = append(m.sumBlob, saved.ID), m.sumSize+int64(n)
	}
	return nil
}

// files lays out the data file, now that all its blobs are known.
func (m *mergedPart) files(ctx context.Context, to Saver) (PartFiles, error) {
	if err := m.saveSums(ctx, to, 1); err != nil {
		return PartFiles{}, err
	}
	last := m.extents[len(m.extents)-1]
	x := &blockindex.Index{Start: m.extents[0].off, End: last.off + last.length}
	data := make([]repo.ID, 0, m.blobs)
	for _, s := range m.sources {
		for _, i := range slices.Sorted(maps.Keys(s.used)) {
			b := s.used[i]
			b.base = x.DataLength
			s.used[i] = b
			x.DataLength += b.size
			data = append(data, b.id)
		}
	}
	x.Extents = make([]blockindex.Extent, 0, len(m.extents))
	for _, e := range m.extents {
		out := blockindex.Extent{Offset: e.off, Length: e.length, Zero: e.source == nil}
		if e.source != nil {
			b := e.source.used[e.blob]
			out.Data = b.base + e.data - b.start
		}
		x.Append(out)
	}
	return PartFiles{Index: x, Data: data, Sums: m.sumBlob, SumSize: m.sumSize}, nil
}
