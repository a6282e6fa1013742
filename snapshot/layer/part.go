// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
)

// A part is closed at whichever of these it reaches first. The first bounds
// its tree blob (67 bytes for each name of a blob, so about 1 MiB), the second
// the memory for its extents.
const (
	maxPartBlobs   = 16384
	maxPartExtents = 1 << 19
)

// metaBlob is the size of the blobs of index and sums.
const metaBlob = 1 << 20

// blob is a blob of the data file. Its place is known when it is added to a
// part, its name when a worker has saved it.
type blob struct {
	size int64
	base int64 // offset in the data file, known when the part is finished
	id   repo.ID
}

// extent points into the data file by way of a blob, since the place of a
// blob that is still being gathered is not known yet. at may lie beyond the
// first blob's end where a run has several: these follow one another.
type extent struct {
	off, length int64
	first       *blob // nil for zeros
	at          int64
	zero        bool
}

// part is a part that is being written.
type part struct {
	start   int64
	extents []extent
	blobs   []*blob
	sums    blocksum.List
	sumSize int64
	sumBlob []*blob
}

// extent adds a described range behind the last one.
func (p *part) extent(e extent) {
	if n := len(p.extents); n > 0 {
		last := &p.extents[n-1]
		if last.off+last.length == e.off && last.zero == e.zero && last.first == e.first &&
			(e.zero || last.at+last.length == e.at) {
			last.length += e.length
			return
		}
	}
	p.extents = append(p.extents, e)
}

// add places a blob behind the others and has it saved.
func (p *part) add(b *blob, data []byte, emit func(*blob, []byte) error) error {
	b.size = int64(len(data))
	p.blobs = append(p.blobs, b)
	return emit(b, data)
}

// index describes the part, which ends at end, once every blob is added.
func (p *part) index(end int64) *blockindex.Index {
	x := &blockindex.Index{Start: p.start, End: end}
	for _, b := range p.blobs {
		b.base = x.DataLength
		x.DataLength += b.size
	}
	x.Extents = make([]blockindex.Extent, 0, len(p.extents))
	for _, e := range p.extents {
		out := blockindex.Extent{Offset: e.off, Length: e.length, Zero: e.zero}
		if !e.zero {
			out.Data = e.first.base + e.at
		}
		x.Append(out)
	}
	return x
}
