// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// lockKey finds the lock on a repository in the context of the work under it.
type lockKey struct{ *Repository }

// CheckLock is [ErrLockLost] if ctx comes from the context of a lock that may be
// another's by now: it was not refreshed in time. What adds to the repository,
// or deletes, asks right before, since after a machine has slept the context
// lasts until somebody has looked at the clock. It asks only the clock. Without
// a lock in ctx it is nil.
func (r *Repository) CheckLock(ctx context.Context) error {
	l, ok := ctx.Value(lockKey{r}).(*Lock)
	if !ok {
		return nil
	}
	l.mu.Lock()
	last := l.file.Time.Round(0) // without the monotonic clock, which stands still while the machine sleeps
	l.mu.Unlock()
	if time.Since(last) < l.times.giveUp {
		return nil
	}
	err := notRefreshed(last)
	l.cancel(err)
	return err
}

func notRefreshed(since time.Time) error {
	return fmt.Errorf("%w: it could not be refreshed since %s", ErrLockLost, since.Format("15:04:05"))
}

// lockStillThere is [ErrLockLost] if ctx has a lock that the store has no more.
func (r *Repository) lockStillThere(ctx context.Context) error {
	l, ok := ctx.Value(lockKey{r}).(*Lock)
	if !ok {
		return nil
	}
	for {
		id := l.currentID()
		_, err := r.be.Stat(ctx, backend.Handle{Type: backend.LockFile, Name: id.String()})
		switch {
		case err == nil:
			return nil
		case errors.Is(context.Cause(ctx), ErrLockLost):
			return context.Cause(ctx)
		case !errors.Is(err, backend.ErrNotExist):
			r.log.Warn("cannot see whether the lock is still there", "error", err)
			return nil
		case l.currentID() == id: // else it was refreshed meanwhile
			return fmt.Errorf("%w: somebody removed it", ErrLockLost)
		}
	}
}

func (l *Lock) currentID() ID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.id
}
