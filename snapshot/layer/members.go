// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Members tells which blocks of a device some layers describe. It is asked in
// device order, and fetches indexes only.
type Members struct {
	m     *Merger
	piece Piece
}

// NewMembers asks layers, oldest first, of a device of size bytes.
func NewMembers(from Loader, layers []*Layer, size int64) *Members {
	return &Members{m: NewMerger(from, layers, size)}
}

// Stretch is how many bytes from off on, n at most, are all described or all not: whole
// blocks, or all n. off is the start of a block and never decreases.
func (s *Members) Stretch(ctx context.Context, off, n int64) (length int64, described bool, err error) {
	for s.piece.End() <= off {
		s.piece, err = s.m.Next(ctx)
		if errors.Is(err, io.EOF) {
			return n, false, nil // the device grew
		}
		if err != nil {
			return 0, false, fmt.Errorf("look for what was written before: %w", err)
		}
	}
	// A layer's last block may be short, and counts as a whole.
	return min(n, kernel.BlocksOf(s.piece.End()-off)*kernel.BlockSize), !s.piece.Missing, nil
}
