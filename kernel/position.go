// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// UUID names one unbroken history of one device. A tracker that starts afresh
// draws a new one.
type UUID [16]byte

// Nonce is drawn at random by each rotation, so that a machine which was
// reverted to an older state cannot mistake a new epoch for the one that it
// saw before.
type Nonce [16]byte

// Position is a point in a tracker's history: the end of Epoch. It counts only
// while the epoch log holds that epoch with this very nonce.
type Position struct {
	Tracker UUID   `json:"tracker"`
	Epoch   uint64 `json:"epoch"`
	Nonce   Nonce  `json:"nonce"`
}

// NewUUID draws a random UUID.
func NewUUID() UUID { return UUID(random16()) }

// NewNonce draws a random nonce.
func NewNonce() Nonce { return Nonce(random16()) }

func random16() (b [16]byte) {
	// crypto/rand.Read never fails since Go 1.24: it aborts the process.
	_, _ = rand.Read(b[:])
	return b
}

// IsZero reports whether the position names no history at all.
func (p Position) IsZero() bool { return p == Position{} }

func (p Position) String() string {
	return fmt.Sprintf("%s/%d/%s", p.Tracker, p.Epoch, p.Nonce)
}

func (u UUID) String() string { return hex.EncodeToString(u[:]) }

// MarshalText writes 32 hex digits.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText reads 32 hex digits.
func (u *UUID) UnmarshalText(b []byte) error { return unhex16(u[:], b, "tracker UUID") }

func (n Nonce) String() string { return hex.EncodeToString(n[:]) }

// MarshalText writes 32 hex digits.
func (n Nonce) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText reads 32 hex digits.
func (n *Nonce) UnmarshalText(b []byte) error { return unhex16(n[:], b, "nonce") }

func unhex16(dst, src []byte, what string) error {
	if len(src) != 32 {
		return fmt.Errorf("parse %s %q: want 32 hex digits", what, src)
	}
	if _, err := hex.Decode(dst, src); err != nil {
		return fmt.Errorf("parse %s %q: %w", what, src, err)
	}
	return nil
}
