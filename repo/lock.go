// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// Times of the locking protocol. They are restic's, which all programs that
// share a repository must keep to.
const (
	lockSettle  = 200 * time.Millisecond // between writing a lock and looking again
	lockStale   = 30 * time.Minute       // age at which a lock counts as left behind
	lockRefresh = 5 * time.Minute
	// A lock is given up a good while before others may call it stale, since
	// clocks differ.
	lockGiveUp = lockStale - lockRefresh*3/2

	lockTimeFormat = "2006-01-02 15:04:05"

	lockRetryFirst = 5 * time.Second
	lockRetryMax   = time.Minute
	unlockTimeout  = time.Minute

	// Whoever interrupts a command does not wait for a store that hangs. The lock of a
	// dead process is recognised.
	interruptedUnlockTimeout = 5 * time.Second
)

// lockFile is a file below locks/.
type lockFile struct {
	Time      time.Time `json:"time"`
	Exclusive bool      `json:"exclusive"`
	Hostname  string    `json:"hostname"`
	Username  string    `json:"username"`
	PID       int       `json:"pid"`
	UID       uint32    `json:"uid,omitempty"`
	GID       uint32    `json:"gid,omitempty"`
}

func newLockFile(exclusive bool) lockFile {
	l := lockFile{Time: time.Now(), Exclusive: exclusive, PID: os.Getpid()}
	l.Hostname, _ = os.Hostname()
	if u, err := user.Current(); err == nil {
		l.Username = u.Username
		uid, _ := strconv.ParseUint(u.Uid, 10, 32)
		gid, _ := strconv.ParseUint(u.Gid, 10, 32)
		l.UID, l.GID = uint32(uid), uint32(gid)
	}
	return l
}

// stale reports a lock that nobody holds any more: it was not refreshed in
// time, or its process on this host is gone.
func (l lockFile) stale(now time.Time) bool {
	if now.After(l.staleAt()) {
		return true
	}
	return !l.elsewhere() && errors.Is(syscall.Kill(l.PID, 0), syscall.ESRCH)
}

// staleAt is when the lock counts as left behind if nobody refreshes it.
func (l lockFile) staleAt() time.Time { return l.Time.Add(lockStale) }

// elsewhere reports a lock of another host, whose process cannot be asked for.
func (l lockFile) elsewhere() bool {
	host, err := os.Hostname()
	return err != nil || host != l.Hostname
}

func (l lockFile) String() string {
	how := "locked"
	if l.Exclusive {
		how = "locked exclusively"
	}
	return fmt.Sprintf("%s by PID %d on %s (user %s) since %s", how, l.PID, l.Hostname, l.Username,
		l.Time.Local().Format(lockTimeFormat))
}

// Lock takes a lock, exclusive (nobody else may have one) or shared (nobody
// else may have an exclusive one). If others are in the way it tries again for
// as long as retry says; then the error is [ErrLocked], with who has it. Locks
// of a dead process are in the way, too, until RemoveStaleLocks takes them
// away: from here it is not certain that they are dead.
func (r *Repository) Lock(ctx context.Context, exclusive bool, retry time.Duration) (*Lock, error) {
	deadline := time.Now().Add(retry)
	wait := lockRetryFirst
	for {
		l, err := r.tryLock(ctx, exclusive)
		left := time.Until(deadline)
		if err == nil || !errors.Is(err, ErrLocked) || left <= 0 {
			return l, err
		}
		r.log.Info("waiting for a lock", "error", err)
		if err := sleep(ctx, min(wait, left)); err != nil {
			return nil, fmt.Errorf("lock repository: %w", err)
		}
		wait = min(2*wait, lockRetryMax)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// LockAhead takes a shared lock without waiting until it is certain: reading may begin
// at once, beside the wait of 200 ms, and nothing may be written before
// [Lock.Settled] returns. If the lock is refused after all, its context ends, with that
// as its cause.
//
// That holds only for a lock that others could see within 200 ms of our first look: whoever
// works under an exclusive lock which that did not find looks again after ours is there, and
// goes. With a store that took longer they may have looked twice in between, and delete by now
// what we would read. So it is then certain before this returns: who is still at work is seen
// by the second look, and who is done has left an index that is loaded after that.
func (r *Repository) LockAhead(ctx context.Context) (*Lock, error) {
	took := stopwatch()
	file, id, err := r.announce(ctx, false)
	if err != nil {
		return nil, err
	}
	if took() >= lockSettle {
		return r.hold(ctx, file, id)
	}
	l := startLock(ctx, r, file, id)
	l.settling = make(chan struct{})
	go func() {
		defer close(l.settling)
		// Others may see a refused lock until Unlock, which only stops them, too.
		if l.refused = r.settle(l.ctx, file, id); l.refused != nil {
			l.cancel(l.refused)
		}
	}()
	return l, nil
}

// stopwatch tells how long ago it was started, also if the machine slept meanwhile, or
// stood still and had its clock set afterwards.
func stopwatch() func() time.Duration {
	awake, wall := sinceBoot(), time.Now().Round(0)
	return func() time.Duration { return max(sinceBoot()-awake, time.Since(wall)) }
}

func sinceBoot() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // Linux has it, and it cannot fail
	return time.Duration(t.Nano())
}

// tryLock looks, writes, waits and looks again: of two that start at the same
// time at least one sees the other.
func (r *Repository) tryLock(ctx context.Context, exclusive bool) (*Lock, error) {
	file, id, err := r.announce(ctx, exclusive)
	if err != nil {
		return nil, err
	}
	return r.hold(ctx, file, id)
}

// hold waits until a lock that was announced is certain.
func (r *Repository) hold(ctx context.Context, file lockFile, id ID) (*Lock, error) {
	if err := r.settle(ctx, file, id); err != nil {
		// Also when ctx is done the lock must go.
		ctx, cancel := unlocking(ctx)
		defer cancel()
		if rmErr := r.removeLock(ctx, id); rmErr != nil {
			r.log.Warn("cannot remove an unused lock", "error", rmErr)
		}
		return nil, err
	}
	return startLock(ctx, r, file, id), nil
}

// unlocking is the context in which a lock is removed that was for work under ctx.
func unlocking(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := unlockTimeout
	if ctx.Err() != nil {
		timeout = interruptedUnlockTimeout
	}
	return context.WithTimeout(context.WithoutCancel(ctx), timeout)
}

// announce is the first half of taking a lock, settle the second.
func (r *Repository) announce(ctx context.Context, exclusive bool) (lockFile, ID, error) {
	file := newLockFile(exclusive)
	if err := r.checkLocks(ctx, file, ID{}); err != nil {
		return file, ID{}, err
	}
	id, err := r.saveLock(ctx, file)
	if err != nil {
		return file, id, fmt.Errorf("lock repository: %w", err)
	}
	return file, id, nil
}

func (r *Repository) settle(ctx context.Context, file lockFile, id ID) error {
	if err := sleep(ctx, lockSettle); err != nil {
		return err
	}
	return r.checkLocks(ctx, file, id)
}

func (r *Repository) saveLock(ctx context.Context, file lockFile) (ID, error) {
	plain, err := json.Marshal(file)
	if err != nil {
		return ID{}, fmt.Errorf("encode lock: %w", err)
	}
	id, _, err := r.saveUnpacked(ctx, backend.LockFile, plain)
	if err == nil {
		file.Time = file.Time.Round(0) // as whoever reads it has it, without the monotonic clock
		r.locks.add(id, file)
	}
	return id, err
}

func (r *Repository) removeLock(ctx context.Context, id ID) error {
	err := r.be.Remove(ctx, backend.Handle{Type: backend.LockFile, Name: id.String()})
	if err != nil && !errors.Is(err, backend.ErrNotExist) {
		return fmt.Errorf("remove lock %s: %w", id.Str(), err)
	}
	return nil
}

// checkLocks reports a lock other than own that forbids the wanted one. What
// cannot be read is in the way: it may be an exclusive lock.
func (r *Repository) checkLocks(ctx context.Context, wanted lockFile, own ID) error {
	return r.eachLock(ctx, own, func(_ ID, other lockFile, err error) error {
		if err != nil {
			return fmt.Errorf("lock repository: %w: there is a lock that cannot be read (%w); if no program uses the repository, `unlock --remove-all` removes it", ErrLocked, err)
		}
		if !wanted.Exclusive && !other.Exclusive {
			return nil
		}
		if other.stale(time.Now()) {
			return fmt.Errorf("lock repository: %w: %s; it looks left behind, `unlock` removes such locks", ErrLocked, other)
		}
		if other.elsewhere() {
			return fmt.Errorf("lock repository: %w: %s; unless it is refreshed it counts as left behind from %s on", ErrLocked, other,
				other.staleAt().Local().Format(lockTimeFormat))
		}
		return fmt.Errorf("lock repository: %w: %s", ErrLocked, other)
	})
}

// RemoveStaleLocks removes the locks that were left behind, or with all every
// lock, and says how many. It leaves alone what it cannot read unless all is
// set: [Repository.Locks] names what stays.
func (r *Repository) RemoveStaleLocks(ctx context.Context, all bool) (removed int, err error) {
	if all {
		files, err := listIDs(ctx, r.be, backend.LockFile)
		if err != nil {
			return 0, err
		}
		for _, f := range files {
			if err := r.removeLock(ctx, f.id); err != nil {
				return removed, err
			}
			removed++
		}
		return removed, nil
	}
	err = r.eachLock(ctx, ID{}, func(id ID, l lockFile, err error) error {
		if err != nil {
			return nil //nolint:nilerr // it stays
		}
		if !l.stale(time.Now()) {
			return nil
		}
		if err := r.removeLock(ctx, id); err != nil {
			return err
		}
		removed++
		return nil
	})
	return removed, err
}
