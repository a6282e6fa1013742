// SPDX-License-Identifier: BSD-2-Clause

package pack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// ErrFormat says that bytes are no pack, or no whole one.
var ErrFormat = errors.New("not a valid pack")

const (
	plainEntrySize      = 1 + 4 + 32     // type, sealed length, ID
	compressedEntrySize = 1 + 4 + 4 + 32 // type, sealed length, plain length, ID
	trailerSize         = 4              // the header's length

	// Overhead is what a pack holds beside its blobs and their entries.
	Overhead = crypto.Overhead + trailerSize

	// maxHeader is the longest header that restic reads, in bytes.
	maxHeader = 16 << 20

	// MaxBlobs is the number of blobs whose header restic reads in any case.
	MaxBlobs = (maxHeader - Overhead) / compressedEntrySize
)

// The type byte of a header entry.
const (
	entryData = iota
	entryTree
	entryCompressedData
	entryCompressedTree
)

// EntrySize is how many bytes of the header a blob takes.
func EntrySize(b Blob) int {
	if b.Compressed() {
		return compressedEntrySize
	}
	return plainEntrySize
}

// appendHeader appends the header's plaintext.
func appendHeader(dst []byte, blobs []Blob) ([]byte, error) {
	for _, b := range blobs {
		var t byte
		switch b.Type {
		case DataBlob:
			t = entryData
		case TreeBlob:
			t = entryTree
		default:
			return nil, fmt.Errorf("encode pack header: %s", b.Type)
		}
		if b.Compressed() {
			t += entryCompressedData
		}
		dst = append(dst, t)
		dst = binary.LittleEndian.AppendUint32(dst, b.Length)
		if b.Compressed() {
			dst = binary.LittleEndian.AppendUint32(dst, b.UncompressedLength)
		}
		dst = append(dst, b.ID[:]...)
	}
	return dst, nil
}

// parseHeader reads the header's plaintext.
func parseHeader(p []byte) ([]Blob, error) {
	blobs := make([]Blob, 0, len(p)/plainEntrySize)
	var offset uint64
	for len(p) > 0 {
		t, size := p[0], plainEntrySize
		if t > entryCompressedTree {
			return nil, fmt.Errorf("decode pack header: entry %d has type %d: %w", len(blobs), t, ErrFormat)
		}
		if t >= entryCompressedData {
			size = compressedEntrySize
		}
		if len(p) < size {
			return nil, fmt.Errorf("decode pack header: entry %d is cut short: %w", len(blobs), ErrFormat)
		}
		b := Blob{Handle: Handle{Type: DataBlob}, Offset: uint32(offset), Length: binary.LittleEndian.Uint32(p[1:])}
		if t == entryTree || t == entryCompressedTree {
			b.Type = TreeBlob
		}
		if size == compressedEntrySize {
			if b.UncompressedLength = binary.LittleEndian.Uint32(p[5:]); b.UncompressedLength == 0 {
				return nil, fmt.Errorf("decode pack header: entry %d is empty and compressed: %w", len(blobs), ErrFormat)
			}
		}
		copy(b.ID[:], p[size-len(b.ID):])
		if b.Length < crypto.Overhead {
			return nil, fmt.Errorf("decode pack header: entry %d has %d bytes: %w", len(blobs), b.Length, ErrFormat)
		}
		if offset += uint64(b.Length); offset > math.MaxUint32 {
			return nil, fmt.Errorf("decode pack header: blobs of more than 4 GiB: %w", ErrFormat)
		}
		blobs = append(blobs, b)
		p = p[size:]
	}
	return blobs, nil
}

// ReadHeader lists the blobs of a pack of size bytes, in their order, which
// fill it up to the header. readAt fills a buffer from an offset of the pack.
func ReadHeader(key *crypto.Key, size int64, readAt func(p []byte, offset int64) error) ([]Blob, error) {
	// Most headers are short: one read that hopes so saves a round trip.
	tail := make([]byte, min(size, Overhead+16*compressedEntrySize))
	if int64(len(tail)) < Overhead {
		return nil, fmt.Errorf("read pack header: the file has %d bytes: %w", size, ErrFormat)
	}
	if err := readAt(tail, size-int64(len(tail))); err != nil {
		return nil, fmt.Errorf("read pack header: %w", err)
	}
	length := int64(binary.LittleEndian.Uint32(tail[len(tail)-trailerSize:]))
	if length < crypto.Overhead || length > maxHeader || length > size-trailerSize {
		return nil, fmt.Errorf("read pack header: its length of %d does not fit a file of %d bytes: %w", length, size, ErrFormat)
	}
	if need := int(length) + trailerSize; need > len(tail) {
		tail = make([]byte, need)
		if err := readAt(tail, size-int64(need)); err != nil {
			return nil, fmt.Errorf("read pack header: %w", err)
		}
	}
	return openHeader(key, size, tail[len(tail)-trailerSize-int(length):len(tail)-trailerSize])
}

func openHeader(key *crypto.Key, size int64, sealed []byte) ([]Blob, error) {
	plain, err := key.Open(nil, sealed)
	if err != nil {
		return nil, fmt.Errorf("read pack header: %w", err)
	}
	blobs, err := parseHeader(plain)
	if err != nil {
		return nil, err
	}
	var end int64
	if n := len(blobs); n > 0 {
		end = int64(blobs[n-1].Offset) + int64(blobs[n-1].Length)
	}
	if end != size-trailerSize-int64(len(sealed)) {
		return nil, fmt.Errorf("read pack header: its blobs end at %d in a file of %d bytes: %w", end, size, ErrFormat)
	}
	return blobs, nil
}
