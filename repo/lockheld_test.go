// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"errors"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// sleptLock is a lock that was last refreshed an hour ago, and nobody has looked
// at the clock since: as right after a machine has slept.
func sleptLock(t testing.TB, r *Repository) *Lock {
	t.Helper()
	file := newLockFile(false)
	file.Time = time.Now().Add(-time.Hour)
	id, err := r.saveLock(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	l := startLockWith(t.Context(), r, file, id, lockTimes{10 * time.Hour, 10 * time.Hour, lockGiveUp})
	t.Cleanup(func() { _ = l.Unlock() })
	return l
}

func count(t testing.TB, r *Repository, what backend.FileType) int {
	t.Helper()
	files, err := r.ListFiles(t.Context(), what)
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// TestAfterASleepNothingIsDoneUnderALockThatIsTooOld: others may have called it stale.
func TestAfterASleepNothingIsDoneUnderALockThatIsTooOld(t *testing.T) {
	r, _ := newRepo(t, Options{})
	sid, _ := testBackup(t, r, newRand(t))
	for _, c := range []struct {
		name string
		do   func(l *Lock) error
	}{
		{"Index", func(l *Lock) error {
			w := r.NewWriter(l.Context(), WriterOptions{})
			defer w.Abort()
			if _, err := w.SaveBlob(t.Context(), KindData, []byte("some data")); err != nil {
				return err
			}
			return w.Flush(t.Context())
		}},
		{"Snapshot", func(l *Lock) error {
			_, _, err := r.SaveSnapshot(l.Context(), &Snapshot{Time: time.Now(), Tree: &ID{1}})
			return err
		}},
		{"RemoveSnapshot", func(l *Lock) error { return r.RemoveSnapshot(l.Context(), sid) }},
		{"RemoveSnapshots", func(l *Lock) error { return r.RemoveSnapshots(l.Context(), []ID{sid}, func(ID, error) {}) }},
		{"RewriteIndex", func(l *Lock) error {
			_, err := r.RewriteIndex(l.Context(), IndexRewrite{All: true})
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := sleptLock(t, r)
			snapshots, indexes := count(t, r, backend.SnapshotFile), count(t, r, backend.IndexFile)
			err := c.do(l)
			if !errors.Is(err, ErrLockLost) {
				t.Errorf("it says %v", err)
			}
			mustBeOneLine(t, err, "could not be refreshed")
			if l.Context().Err() == nil {
				t.Error("the lock's context goes on")
			}
			if n := count(t, r, backend.SnapshotFile); n != snapshots {
				t.Errorf("%d snapshots, %d before", n, snapshots)
			}
			if n := count(t, r, backend.IndexFile); n != indexes {
				t.Errorf("%d index files, %d before", n, indexes)
			}
		})
	}
}

// TestASnapshotUnderALockThatIsGoneIsAnError: it was there when the snapshot was begun.
func TestASnapshotUnderALockThatIsGoneIsAnError(t *testing.T) {
	r, _ := newRepo(t, Options{})
	testBackup(t, r, newRand(t))
	for _, gone := range []bool{false, true} {
		l := quickLock(t, r, lockTimes{time.Hour, time.Hour, time.Hour})
		if gone {
			if _, err := r.RemoveStaleLocks(t.Context(), true); err != nil {
				t.Fatal(err)
			}
		}
		id, _, err := r.SaveSnapshot(l.Context(), &Snapshot{Time: time.Now(), Tree: &ID{1}})
		if errors.Is(err, ErrLockLost) != gone {
			t.Errorf("gone=%t: %v", gone, err)
		}
		if gone {
			mustBeOneLine(t, err, id.Str(), "run `check`")
		}
		if err := l.Unlock(); err != nil {
			t.Error(err)
		}
	}
}

// TestASnapshotIsSavedWhileTheLockIsRefreshed: the file of the lock changes all the time.
func TestASnapshotIsSavedWhileTheLockIsRefreshed(t *testing.T) {
	r, dir := newRepo(t, Options{})
	l := quickLock(t, r, lockTimes{time.Millisecond, time.Millisecond, time.Hour})
	first := lockNames(t, dir)[0]
	for i := 0; i < 50 || lockNames(t, dir)[0] == first; i++ {
		if _, _, err := r.SaveSnapshot(l.Context(), &Snapshot{Time: time.Now(), Tree: &ID{1}}); err != nil {
			t.Fatal(err)
		}
	}
}
