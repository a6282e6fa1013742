// SPDX-License-Identifier: BSD-2-Clause

package pack

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// ID is the SHA-256 of a file as stored, or of a blob's plaintext.
type ID [sha256.Size]byte

// Hash is the ID of data.
func Hash(data []byte) ID { return sha256.Sum256(data) }

// ParseID reads 64 hex digits.
func ParseID(s string) (id ID, err error) {
	return id, id.UnmarshalText([]byte(s))
}

// String is the ID in 64 hex digits, as files are named.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Str is the ID's first 8 hex digits, as restic shows IDs to people.
func (id ID) Str() string { return hex.EncodeToString(id[:4]) }

// IsNull reports an ID that was never set.
func (id ID) IsNull() bool { return id == ID{} }

// Compare orders IDs by their bytes.
func (id ID) Compare(other ID) int { return bytes.Compare(id[:], other[:]) }

// MarshalText writes 64 hex digits.
func (id ID) MarshalText() ([]byte, error) {
	return hex.AppendEncode(make([]byte, 0, 2*len(id)), id[:]), nil
}

// UnmarshalText reads 64 hex digits.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(id) {
		return fmt.Errorf("parse ID %.80q: want 64 hex digits", b)
	}
	if _, err := hex.Decode(id[:], b); err != nil {
		return fmt.Errorf("parse ID %q: %w", b, err)
	}
	return nil
}
