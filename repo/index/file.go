// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// ErrDamaged says that an index file or a table does not hold what it should.
var ErrDamaged = errors.New("damaged index")

// Pack lists the blobs of one pack.
type Pack struct {
	ID    pack.ID
	Blobs []pack.Blob
}

type fileJSON struct {
	Packs []packJSON `json:"packs"`
}

type packJSON struct {
	ID    pack.ID    `json:"id"`
	Blobs []blobJSON `json:"blobs"`
}

type blobJSON struct {
	ID                 pack.ID       `json:"id"`
	Type               pack.BlobType `json:"type"`
	Offset             uint32        `json:"offset"`
	Length             uint32        `json:"length"`
	UncompressedLength uint32        `json:"uncompressed_length,omitempty"`
}

// Encode writes the plaintext of an index file.
func Encode(packs []Pack) ([]byte, error) {
	file := fileJSON{Packs: make([]packJSON, len(packs))}
	for i, p := range packs {
		blobs := make([]blobJSON, len(p.Blobs))
		for j, b := range p.Blobs {
			blobs[j] = blobJSON{b.ID, b.Type, b.Offset, b.Length, b.UncompressedLength}
		}
		file.Packs[i] = packJSON{p.ID, blobs}
	}
	var buf bytes.Buffer
	if err := json.NewEncoder(&buf).Encode(file); err != nil {
		return nil, fmt.Errorf("encode index: %w", err)
	}
	return buf.Bytes(), nil
}

// Decode reads the plaintext of an index file. The error wraps [ErrDamaged].
func Decode(data []byte) ([]Pack, error) {
	var file fileJSON
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, fmt.Errorf("decode index: %w: %w", ErrDamaged, err)
	}
	packs := make([]Pack, len(file.Packs))
	for i, p := range file.Packs {
		blobs := make([]pack.Blob, len(p.Blobs))
		for j, b := range p.Blobs {
			if b.Length < crypto.Overhead || b.Type == 0 || uint64(b.Offset)+uint64(b.Length) > 1<<32 {
				return nil, fmt.Errorf("decode index: blob %s in pack %s has no valid place: %w", b.ID.Str(), p.ID.Str(), ErrDamaged)
			}
			blobs[j] = pack.Blob{
				Handle: pack.Handle{Type: b.Type, ID: b.ID},
				Offset: b.Offset, Length: b.Length, UncompressedLength: b.UncompressedLength,
			}
		}
		packs[i] = Pack{p.ID, blobs}
	}
	return packs, nil
}
