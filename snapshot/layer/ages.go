// SPDX-License-Identifier: BSD-2-Clause

package layer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Age is how lately a block was written, as far as the layers of a chain tell: the less
// lately, the longer it is likely to stay as it is.
type Age int

// What a block is, in the terms of docs/format.md.
const (
	Settled Age = iota // described by none of the layers that are asked
	Older              // by the older generation
	Newer              // by what is newer

	ages = iota
)

// Ages tells the ages of a device's blocks. It is asked in device order, and fetches
// indexes only.
type Ages struct {
	m     *Merger
	older *Layer // or nil
	piece Piece
}

// NewAges asks layers, oldest first, of a device of size bytes. Those of what has settled
// are not among them; the first one may be the older generation.
func NewAges(from Loader, layers []*Layer, older bool, size int64) *Ages {
	a := &Ages{m: NewMerger(from, layers, size)}
	if older {
		a.older = layers[0]
	}
	return a
}

// Stretch is how many bytes from off on, n at most, are all of one age: whole blocks, or
// all n. off is the start of a block and never decreases.
func (a *Ages) Stretch(ctx context.Context, off, n int64) (length int64, age Age, err error) {
	for a.piece.End() <= off {
		a.piece, err = a.m.Next(ctx)
		if errors.Is(err, io.EOF) {
			return n, Settled, nil // the device grew
		}
		if err != nil {
			return 0, 0, fmt.Errorf("look for what was written before: %w", err)
		}
	}
	switch {
	case a.piece.Missing:
		age = Settled
	case a.piece.cursor.layer == a.older:
		age = Older
	default:
		age = Newer
	}
	// A layer's last block may be short, and counts as a whole.
	return min(n, kernel.BlocksOf(a.piece.End()-off)*kernel.BlockSize), age, nil
}
