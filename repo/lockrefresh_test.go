// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
)

// quickLock is a lock with times of a test.
func quickLock(t testing.TB, r *Repository, times lockTimes) *Lock {
	t.Helper()
	file := newLockFile(false)
	id, err := r.saveLock(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	l := startLockWith(t.Context(), r, file, id, times)
	t.Cleanup(func() { _ = l.Unlock() })
	return l
}

func TestLockIsRefreshedAndLeavesNothingBehind(t *testing.T) {
	r, dir := newRepo(t, Options{})
	l := quickLock(t, r, lockTimes{time.Millisecond, 20 * time.Millisecond, time.Hour})
	seen := map[string]bool{}
	waitFor(t, "five refreshes", func() bool {
		for _, name := range lockNames(t, dir) {
			if !strings.Contains(filepath.Base(name), "tmp") { // while it is being written
				seen[name] = true
			}
		}
		return len(seen) > 5
	})
	if l.Context().Err() != nil {
		t.Error(context.Cause(l.Context()))
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	if names := lockNames(t, dir); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

func TestLockThatSomebodyRemovedIsLost(t *testing.T) {
	r, dir := newRepo(t, Options{})
	l := quickLock(t, r, lockTimes{time.Millisecond, 200 * time.Millisecond, time.Hour})
	if _, err := r.RemoveStaleLocks(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	waitForLoss(t, l, "removed")
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	if names := lockNames(t, dir); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

func waitForLoss(t testing.TB, l *Lock, why string) {
	t.Helper()
	select {
	case <-l.Context().Done():
	case <-time.After(time.Minute):
		t.Fatal("the lock is not lost")
	}
	cause := context.Cause(l.Context())
	if !errors.Is(cause, ErrLockLost) {
		t.Error(cause)
	}
	mustBeOneLine(t, cause, why)
}

func TestLockThatCannotBeRefreshedInTimeIsLost(t *testing.T) {
	for name, rule := range map[string]faulty.Rule{
		"failing": {Ops: faulty.Save, Types: []backend.FileType{backend.LockFile}, Where: faulty.Before},
		"hanging": {Ops: faulty.Save, Types: []backend.FileType{backend.LockFile}, Delay: time.Hour},
	} {
		dir := filepath.Join(t.TempDir(), "repo")
		be := faulty.New(openLocal(t, dir))
		r, err := Init(t.Context(), be, testPassword, Options{KDF: lightKDF})
		if err != nil {
			t.Fatal(err)
		}
		l := quickLock(t, r, lockTimes{time.Millisecond, 20 * time.Millisecond, 500 * time.Millisecond})
		be.Inject(rule)
		waitForLoss(t, l, "could not be refreshed")
		be.Heal()
		if err := l.Unlock(); err != nil {
			t.Error(name, err)
		}
		if names := lockNames(t, dir); len(names) != 0 {
			t.Errorf("%s: left: %v", name, names)
		}
	}
}
