// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// maxUnanswered is how many files may fail for as long as the store is tried again.
// Each takes that long, and a store that is as good as gone would fail all.
const maxUnanswered = 2

// Alive asks the store for a file that every repository has.
func Alive(ctx context.Context, r *repo.Repository) error {
	err := r.Backend().Load(ctx, backend.Handle{Type: backend.ConfigFile}, 0, 0, func(rd io.Reader) error {
		_, err := io.Copy(io.Discard, rd)
		return err
	})
	if err != nil {
		return fmt.Errorf("the store does not give the repository's config any more: %w", err)
	}
	return nil
}

// blame says whose fault it is that something could not be read: nil if it is the
// file's, which then is a finding, or the error that ends the check.
func (c *checker) blame(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case repo.IsDamage(err):
		return nil
	}
	if gone := Alive(ctx, c.repo); gone != nil {
		return fmt.Errorf("%w; %w", gone, err)
	}
	if errors.Is(err, backend.ErrPermanent) {
		return nil
	}
	if n := c.unanswered.Add(1); n > maxUnanswered {
		return fmt.Errorf("%d files could not be read however often that was tried, the last is: %w", n, err)
	}
	return nil
}

// unread is how an error that blame has found to be a finding is named.
func unread(err error) error {
	if repo.IsDamage(err) {
		return err
	}
	return fmt.Errorf("it cannot be read: %w", err)
}
