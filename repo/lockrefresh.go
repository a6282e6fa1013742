// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// Lock is a lock that is held and refreshed until Unlock.
type Lock struct {
	repo   *Repository
	parent context.Context // done: the command was interrupted
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{}
	once   sync.Once
	err    error
	times  lockTimes

	settling chan struct{} // closed when it is certain whether the lock is held; nil: it is held
	refused  error         // why not, once that is closed

	mu   sync.Mutex
	file lockFile // as of the last refresh
	id   ID
}

// lockTimes are when a lock is refreshed and when it is given up.
type lockTimes struct{ check, refresh, giveUp time.Duration }

func startLock(ctx context.Context, r *Repository, file lockFile, id ID) *Lock {
	return startLockWith(ctx, r, file, id, lockTimes{time.Second, lockRefresh, lockGiveUp})
}

func startLockWith(ctx context.Context, r *Repository, file lockFile, id ID, times lockTimes) *Lock {
	l := &Lock{repo: r, parent: ctx, file: file, id: id, times: times, done: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancelCause(context.WithValue(ctx, lockKey{r}, l))
	// To see whether a lock's process lives, restic's unlock sends it SIGHUP:
	// that must not end us.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		defer close(l.done)
		defer signal.Stop(hup)
		l.keep()
	}()
	return l
}

// Context is done when the lock is gone: after Unlock, or with [ErrLockLost] as
// its cause when the lock could not be refreshed in time or was removed. All
// work under the lock uses it.
func (l *Lock) Context() context.Context { return l.ctx }

// Settled returns when the lock is certain, and an error that is [ErrLocked] when
// it is refused.
func (l *Lock) Settled(ctx context.Context) error {
	if l.settling == nil {
		return nil
	}
	select {
	case <-l.settling:
		return l.refused
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Unlock ends the lock's context and removes the lock. It may be called again.
func (l *Lock) Unlock() error {
	l.once.Do(func() {
		l.cancel(errUnlocked)
		<-l.done
		if l.settling != nil {
			<-l.settling
		}
		ctx, cancel := unlocking(l.parent)
		defer cancel()
		if err := l.repo.removeLock(ctx, l.id); err != nil {
			l.err = fmt.Errorf("%w: the lock stays, and what was done is done; `unlock` with credentials that may delete removes it", err)
		}
	})
	return l.err
}

var errUnlocked = errors.New("the repository was unlocked")

// keep refreshes the lock until the context is done. It looks at the wall
// clock often instead of setting a long timer, since timers stand still while
// the machine sleeps and others' clocks do not. Refreshing runs beside it, so
// that a store that hangs cannot keep it from giving up in time.
func (l *Lock) keep() {
	ticker := time.NewTicker(l.times.check)
	defer ticker.Stop()
	var running chan error // nil while nothing is being refreshed
	defer func() {
		if running != nil {
			<-running //nolint:errcheck // the lock goes anyhow
		}
	}()
	last := l.file.Time.Round(0) // without the monotonic clock
	next := last.Add(l.times.refresh)
	for {
		select {
		case <-l.ctx.Done():
			return
		case err := <-running:
			running = nil
			last, next = l.refreshed(err, last)
			continue
		case <-ticker.C:
		}
		now := time.Now().Round(0)
		if now.Sub(last) >= l.times.giveUp {
			l.cancel(notRefreshed(last))
			return
		}
		if running == nil && !now.Before(next) {
			result := make(chan error, 1)
			running = result
			go func() { result <- l.refresh() }()
		}
	}
}

// refreshed takes note of how a refresh ended, and says when the last good one
// was and when the next one is due: after a failure, soon.
func (l *Lock) refreshed(err error, last time.Time) (newLast, next time.Time) {
	switch {
	case err == nil:
		last = l.file.Time.Round(0)
		return last, last.Add(l.times.refresh)
	case errors.Is(err, ErrLockLost):
		l.cancel(err)
	case l.ctx.Err() == nil:
		l.repo.log.Warn("cannot refresh the lock", "error", err)
	}
	return last, time.Now().Round(0).Add(l.times.refresh / 10)
}

// refresh writes a new lock and removes the old one. If the old one is gone
// someone removed it, and may have begun to work on the repository since.
func (l *Lock) refresh() error {
	old := backend.Handle{Type: backend.LockFile, Name: l.id.String()}
	if err := l.stillThere(l.ctx, old); err != nil {
		return err
	}
	file := l.file
	file.Time = time.Now()
	id, err := l.repo.saveLock(l.ctx, file)
	if err != nil {
		return err
	}
	// From here on there are two locks; one of them goes, whatever happens.
	clean, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), unlockTimeout)
	defer cancel()
	if err := l.stillThere(clean, old); err != nil {
		if rmErr := l.repo.removeLock(clean, id); rmErr != nil {
			l.repo.log.Warn("cannot remove a lock", "error", rmErr)
		}
		return err
	}
	l.mu.Lock()
	l.file, l.id = file, id
	l.mu.Unlock()
	if err := l.repo.be.Remove(clean, old); err != nil && !errors.Is(err, backend.ErrNotExist) {
		l.repo.log.Warn("cannot remove the lock from before the refresh", "error", err)
	}
	return nil
}

func (l *Lock) stillThere(ctx context.Context, h backend.Handle) error {
	_, err := l.repo.be.Stat(ctx, h)
	if errors.Is(err, backend.ErrNotExist) {
		return fmt.Errorf("%w: somebody removed it", ErrLockLost)
	}
	if err != nil {
		return fmt.Errorf("refresh lock: %w", err)
	}
	return nil
}
