// SPDX-License-Identifier: BSD-2-Clause

package pack

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// Builder gathers sealed blobs into one pack in memory. The zero value is an
// empty pack. It is for one goroutine at a time.
type Builder struct {
	data    []byte
	blobs   []Blob
	entries int // bytes of the header's plaintext so far
	limit   int
}

// NewBuilder returns an empty pack that will lie in buf's memory while it
// fits. A finished pack of up to limit bytes never takes more memory than that.
func NewBuilder(buf []byte, limit int) *Builder { return &Builder{data: buf[:0], limit: limit} }

// Buffer is the pack's memory, to be used again when the pack is not.
func (b *Builder) Buffer() []byte { return b.data }

// reserve makes room for a pack of need bytes. Memory grows fourfold up to the limit, so that a
// small pack takes little and a full one is not copied often.
func (b *Builder) reserve(need int) {
	if need <= cap(b.data) {
		return
	}
	size := max(4*cap(b.data), 256<<10)
	if size > b.limit {
		size = b.limit
	}
	grown := make([]byte, len(b.data), max(size, need))
	copy(grown, b.data)
	b.data = grown
}

// Len is the number of blobs so far.
func (b *Builder) Len() int { return len(b.blobs) }

// Size is how long the pack would be if it were finished now, in bytes.
func (b *Builder) Size() int { return len(b.data) + b.entries + Overhead }

// Add appends a sealed blob, which is copied. uncompressed is the length of
// the plaintext if the blob is compressed, and 0 otherwise.
func (b *Builder) Add(h Handle, sealed []byte, uncompressed int) {
	blob := Blob{Handle: h, Offset: uint32(len(b.data)), Length: uint32(len(sealed)), UncompressedLength: uint32(uncompressed)}
	b.blobs = append(b.blobs, blob)
	b.entries += EntrySize(blob)
	b.reserve(b.Size() + len(sealed))
	b.data = append(b.data, sealed...)
}

// Merge appends all blobs of other, which must not be used any more.
func (b *Builder) Merge(other *Builder) {
	for _, o := range other.blobs {
		b.Add(o.Handle, other.data[o.Offset:o.Offset+o.Length], int(o.UncompressedLength))
	}
}

// Finish appends the header and returns the whole file and its blobs. The
// header is decoded again first, since a pack with a bad one is lost to a
// rebuild of the index.
func (b *Builder) Finish(key *crypto.Key) ([]byte, []Blob, error) {
	header, err := appendHeader(make([]byte, 0, b.entries), b.blobs)
	if err != nil {
		return nil, nil, err
	}
	start := len(b.data)
	b.data = key.Seal(b.data, header)
	b.data = binary.LittleEndian.AppendUint32(b.data, uint32(len(b.data)-start))
	again, err := ReadHeader(key, int64(len(b.data)), func(p []byte, offset int64) error {
		copy(p, b.data[offset:])
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("check the header of a new pack: %w", err)
	}
	if !slices.Equal(again, b.blobs) {
		return nil, nil, fmt.Errorf("check the header of a new pack: it does not say what was written (bad memory?)")
	}
	return b.data, b.blobs, nil
}
