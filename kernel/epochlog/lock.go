// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// lockDir is on a tmpfs, outside of every state directory: two commands with
// different state directories still exclude each other, and a frozen file
// system cannot block the lock.
const lockDir = "/run/dsync-backup"

const lockPoll = 20 * time.Millisecond

// Lock waits for a tracker's lock until ctx is done. A [Session] has it while it
// is not unlocked; this is for whoever gives a tracker its UUID.
func Lock(ctx context.Context, u kernel.UUID) (unlock func(), err error) {
	f, err := lockTracker(ctx, u)
	if err != nil {
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}

// lockTracker waits for a tracker's lock, which ends with the descriptor.
func lockTracker(ctx context.Context, u kernel.UUID) (*os.File, error) {
	if err := os.MkdirAll(lockDir, 0o700); err != nil {
		return nil, fmt.Errorf("lock tracker: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(lockDir, u.String()+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock tracker: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock tracker %s: %w", u, err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock tracker %s: another process holds it: %w", u, ctx.Err()), f.Close())
		case <-time.After(lockPoll):
		}
	}
}
