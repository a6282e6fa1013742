// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// lockCounter counts how often locks are loaded, and how many at a time.
type lockCounter struct {
	backend.Backend
	loads, now atomic.Int32
	company    sync.Once
	two        chan struct{} // closed when two are loaded at a time
}

func (b *lockCounter) Connections() int { return 4 }

func (b *lockCounter) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if h.Type == backend.LockFile {
		b.loads.Add(1)
		if n := b.now.Add(1); n > 1 {
			b.company.Do(func() { close(b.two) })
		}
		select {
		case <-b.two:
		case <-time.After(time.Second): // nobody comes
		}
		defer b.now.Add(-1)
	}
	return b.Backend.Load(ctx, h, length, offset, fn)
}

// TestLocksThatStayAreLoadedOnceAndTogether: where locks cannot be deleted there are many.
func TestLocksThatStayAreLoadedOnceAndTogether(t *testing.T) {
	other, dir := newRepo(t, Options{})
	for range 10 {
		if _, err := other.saveLock(t.Context(), newLockFile(false)); err != nil {
			t.Fatal(err)
		}
	}
	be := &lockCounter{Backend: openLocal(t, dir), two: make(chan struct{})}
	r, err := Open(t.Context(), be, testPassword, Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := r.Lock(t.Context(), false, 0)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-be.two:
	default:
		t.Error("never were two locks loaded at a time")
	}
	if n := be.loads.Load(); n > 10 {
		t.Errorf("10 locks were loaded %d times", n)
	}
	// What is known goes on being a reason, and what is new is seen.
	if _, err := r.tryLock(t.Context(), true); !errors.Is(err, ErrLocked) {
		t.Errorf("an exclusive lock beside 11 others: %v", err)
	}
	before := be.loads.Load()
	if _, err := other.saveLock(t.Context(), newLockFile(true)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.tryLock(t.Context(), false); !errors.Is(err, ErrLocked) || be.loads.Load() != before+1 {
		t.Errorf("a lock beside a new exclusive one, with %d loads: %v", be.loads.Load()-before, err)
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	if n, err := r.RemoveStaleLocks(t.Context(), true); err != nil || n != 11 || len(lockNames(t, dir)) != 0 {
		t.Errorf("%d removed, %v", n, err)
	}
	if l, err = r.Lock(t.Context(), true, 0); err != nil {
		t.Fatal("an exclusive lock after all went:", err)
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
