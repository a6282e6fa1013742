// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"context"

	"golang.org/x/sync/semaphore"
)

// Flight bounds how many reads of a source many goroutines have in flight together.
type Flight struct {
	from Source
	most int64 // of one goroutine
	all  *semaphore.Weighted
}

// NewFlight allows up to parallel reads.
func NewFlight(from Source, parallel int) *Flight {
	// Two batches under way: while one is dealt with, the device has the other.
	return &Flight{from, int64(max(1, parallel/2)), semaphore.NewWeighted(int64(parallel))}
}

// Read does all the reads. If ctx ended meanwhile, the error is what ended it.
func (f *Flight) Read(ctx context.Context, reads []Read) error {
	if len(reads) == 0 {
		return nil
	}
	most := min(int64(len(reads)), f.most)
	if err := f.all.Acquire(ctx, most); err != nil {
		return context.Cause(ctx)
	}
	defer f.all.Release(most)
	err := f.from.ReadExtents(ctx, reads, int(most))
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}
