// SPDX-License-Identifier: BSD-2-Clause

// Package pack reads and writes pack files: sealed blobs one after the other,
// then a sealed header that lists them, then the header's length.
//
// It promises that a header which decodes describes blobs that lie back to
// back in front of it, and that what [Builder] finishes decodes to what was
// added. It knows nothing of files, indexes or compression. The format is
// restic's design document, section "Pack Format".
package pack

import (
	"fmt"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// BlobType says what a blob's plaintext is.
type BlobType uint8

// The types of blobs.
const (
	DataBlob BlobType = iota + 1 // a piece of a file
	TreeBlob                     // a directory as JSON
)

func (t BlobType) String() string {
	switch t {
	case DataBlob:
		return "data"
	case TreeBlob:
		return "tree"
	}
	return fmt.Sprintf("blob type %d", uint8(t))
}

// MarshalText writes "data" or "tree".
func (t BlobType) MarshalText() ([]byte, error) {
	if t != DataBlob && t != TreeBlob {
		return nil, fmt.Errorf("encode blob type %d: not a type", uint8(t))
	}
	return []byte(t.String()), nil
}

// UnmarshalText reads "data" or "tree".
func (t *BlobType) UnmarshalText(b []byte) error {
	switch string(b) {
	case "data":
		*t = DataBlob
	case "tree":
		*t = TreeBlob
	default:
		return fmt.Errorf("decode blob type %.20q: want data or tree", b)
	}
	return nil
}

// Handle names a blob: data and tree blobs of the same bytes are two blobs.
type Handle struct {
	Type BlobType
	ID   ID
}

func (h Handle) String() string { return h.Type.String() + " blob " + h.ID.Str() }

// Blob is a blob's place in a pack. All lengths are in bytes.
type Blob struct {
	Handle
	Offset             uint32 // of the sealed blob in the pack
	Length             uint32 // as sealed
	UncompressedLength uint32 // of the plaintext; 0 if it is not compressed
}

// Compressed reports whether the sealed bytes are zstd.
func (b Blob) Compressed() bool { return b.UncompressedLength != 0 }

// PlainLength is the length of the blob's plaintext.
func (b Blob) PlainLength() int {
	if b.Compressed() {
		return int(b.UncompressedLength)
	}
	return int(b.Length) - crypto.Overhead
}
