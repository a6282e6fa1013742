// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

// lockerEnv makes the test program take a lock on the repository that it names
// and hold it until it is killed.
const lockerEnv = "REPO_TEST_HOLD_LOCK"

func TestMain(m *testing.M) {
	if dir := os.Getenv(lockerEnv); dir != "" {
		holdLock(dir)
	}
	os.Exit(m.Run())
}

func holdLock(dir string) {
	be, err := local.Open(dir, local.Options{})
	var r *Repository
	if err == nil {
		r, err = Open(context.Background(), be, testPassword, Options{})
	}
	if err == nil {
		_, err = r.Lock(context.Background(), true, 0)
	}
	fmt.Println("holding:", err)
	_, _ = io.ReadAll(os.Stdin)
	os.Exit(0)
}

func lockNames(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "locks", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// waitFor fails the test if cond does not come true within a time that is only
// there to end a test that hangs.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still waiting for %s", what)
		}
	}
}

// holding starts a restic that takes a lock and then waits for its standard
// input: exclusive for a new password, shared for data to back up. It returns
// the process and what ends it.
func (s stock) holding(t testing.TB, dir string, exclusive bool) (*exec.Cmd, io.Closer) {
	t.Helper()
	args := []string{"backup", "--stdin"}
	if exclusive {
		args = []string{"key", "passwd"}
	}
	cmd := s.command(t, dir, args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	before := len(lockNames(t, dir))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	waitFor(t, "restic's lock", func() bool { return len(lockNames(t, dir)) > before })
	time.Sleep(2 * lockSettle) // restic itself looks twice before it is sure
	return cmd, in
}

func TestResticsExclusiveLockStopsUs(t *testing.T) {
	for _, s := range stockRestics(t) {
		r, dir := newRepo(t, Options{})
		cmd, in := s.holding(t, dir, true)
		for _, exclusive := range []bool{false, true} {
			l, err := r.Lock(t.Context(), exclusive, 0)
			if !errors.Is(err, ErrLocked) {
				t.Fatalf("restic %s, exclusive %v: %v, %v", s.version, exclusive, l, err)
			}
			mustBeOneLine(t, err, "exclusively", fmt.Sprintf("PID %d", cmd.Process.Pid))
		}
		if n := len(lockNames(t, dir)); n != 1 {
			t.Errorf("%d locks, want restic's only", n)
		}
		// A lock that is awaited is had when it is free.
		got := make(chan error)
		go func() {
			l, err := r.Lock(context.WithoutCancel(t.Context()), false, time.Minute)
			if err == nil {
				err = l.Unlock()
			}
			got <- err
		}()
		in.Close()
		_ = cmd.Wait()
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
}

func TestResticsSharedLockStopsOurExclusiveOneOnly(t *testing.T) {
	for _, s := range stockRestics(t) {
		r, dir := newRepo(t, Options{})
		cmd, _ := s.holding(t, dir, false)
		if _, err := r.Lock(t.Context(), true, 0); !errors.Is(err, ErrLocked) {
			t.Errorf("restic %s: %v", s.version, err)
		} else {
			mustBeOneLine(t, err, fmt.Sprintf("PID %d", cmd.Process.Pid))
		}
		l, err := r.Lock(t.Context(), false, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Unlock(); err != nil {
			t.Error(err)
		}
		if n := len(lockNames(t, dir)); n != 1 {
			t.Errorf("%d locks, want restic's only", n)
		}
	}
}

func TestOurLocksStopRestic(t *testing.T) {
	for _, s := range stockRestics(t) {
		r, dir := newRepo(t, Options{})
		for _, exclusive := range []bool{false, true} {
			l, err := r.Lock(t.Context(), exclusive, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, pruneErr := s.try(t, dir, "prune")
			_, backupErr := s.try(t, dir, "backup", "lock_test.go")
			for what, c := range map[string]struct {
				err  error
				want bool
			}{"prune": {pruneErr, true}, "backup": {backupErr, exclusive}} {
				if stopped := c.err != nil && strings.Contains(c.err.Error(), fmt.Sprintf("locked %sby PID %d", map[bool]string{true: "exclusively "}[exclusive], os.Getpid())); stopped != c.want || c.want != (c.err != nil) {
					t.Errorf("restic %s %s under our lock (exclusive %v): %v", s.version, what, exclusive, c.err)
				}
			}
			// unlock leaves us the lock, and the SIGHUP by which it asks whether
			// we live does not end us.
			s.run(t, dir, "unlock")
			if n := len(lockNames(t, dir)); n != 1 {
				t.Errorf("%d locks after restic unlock", n)
			}
			if l.Context().Err() != nil {
				t.Error(context.Cause(l.Context()))
			}
			if err := l.Unlock(); err != nil {
				t.Error(err)
			}
			if err := l.Unlock(); err != nil {
				t.Error("unlocking again:", err)
			}
			if n := len(lockNames(t, dir)); n != 0 || l.Context().Err() == nil {
				t.Errorf("%d locks after Unlock", n)
			}
		}
		s.run(t, dir, "prune")
	}
}

func TestLocksOfDeadProcessesAreRemovedByUsAndByRestic(t *testing.T) {
	for _, s := range stockRestics(t) {
		r, dir := newRepo(t, Options{})
		cmd, _ := s.holding(t, dir, true)
		live, err := r.RemoveStaleLocks(t.Context(), false)
		if err != nil || live != 0 {
			t.Errorf("%d live locks removed, %v", live, err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		_, err = r.Lock(t.Context(), false, 0)
		if !errors.Is(err, ErrLocked) {
			t.Error(err)
		}
		mustBeOneLine(t, err, "looks left behind", "`unlock`")
		if n, err := r.RemoveStaleLocks(t.Context(), false); err != nil || n != 1 {
			t.Errorf("%d removed, %v", n, err)
		}

		// The other way: restic clears away a dead one of ours.
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), lockerEnv+"="+dir)
		in, err := child.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 100)
		if n, err := out.Read(line); err != nil || string(line[:n]) != "holding: <nil>\n" {
			t.Fatalf("%q, %v", line[:n], err)
		}
		s.run(t, dir, "unlock")
		if n := len(lockNames(t, dir)); n != 1 {
			t.Errorf("%d locks, want the living one", n)
		}
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = child.Wait()
		s.run(t, dir, "unlock")
		if n := len(lockNames(t, dir)); n != 0 {
			t.Errorf("%d locks after restic unlock", n)
		}
	}
}

func TestStaleIsOldOrDeadOnThisHost(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for _, c := range []struct {
		age  time.Duration
		host string
		pid  int
		want bool
	}{
		{0, host, os.Getpid(), false},
		{29 * time.Minute, host, os.Getpid(), false},
		{31 * time.Minute, host, os.Getpid(), true},
		{0, host, dead.Process.Pid, true},
		{0, host + "x", dead.Process.Pid, false},
		{31 * time.Minute, "x", 1, true},
		{0, host, 1, false},
	} {
		if got := (lockFile{Time: now.Add(-c.age), Hostname: c.host, PID: c.pid}).stale(now); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestAllLocksGoWhenAsked(t *testing.T) {
	r, dir := newRepo(t, Options{})
	l, err := r.Lock(t.Context(), false, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	junk := []byte("not a lock")
	if err := os.WriteFile(filepath.Join(dir, "locks", Hash(junk).String()), junk, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = r.Lock(t.Context(), false, 0)
	if !errors.Is(err, ErrLocked) {
		t.Errorf("a lock that cannot be read is passed over: %v", err)
	}
	mustBeOneLine(t, err, "cannot be read")
	if n, err := r.RemoveStaleLocks(t.Context(), false); err != nil || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
	left, err := r.Locks(t.Context())
	if err != nil || len(left) != 2 || left[0].ID != Hash(junk) || left[0].Error == "" || left[1].PID != os.Getpid() || left[1].Error != "" {
		t.Errorf("%+v, %v", left, err)
	}
	if n, err := r.RemoveStaleLocks(t.Context(), true); err != nil || n != 2 {
		t.Errorf("%d, %v", n, err)
	}
}

// Of several that want an exclusive lock at the same moment at most one gets
// it.
func TestExclusiveLocksExcludeEachOther(t *testing.T) {
	r, dir := newRepo(t, Options{})
	for round := range 3 {
		type result struct {
			lock *Lock
			err  error
		}
		results := make(chan result)
		for range 4 {
			go func() {
				l, err := r.Lock(context.WithoutCancel(t.Context()), true, 0)
				results <- result{l, err}
			}()
		}
		var held []*Lock
		for range 4 {
			res := <-results
			if res.err == nil {
				held = append(held, res.lock)
			} else if !errors.Is(res.err, ErrLocked) {
				t.Error(res.err)
			}
		}
		if len(held) > 1 {
			t.Errorf("round %d: %d exclusive locks at once", round, len(held))
		}
		for _, l := range held {
			if err := l.Unlock(); err != nil {
				t.Error(err)
			}
		}
		if names := lockNames(t, dir); len(names) != 0 {
			t.Errorf("left: %v", names)
		}
	}
}

// lateLocker writes an exclusive lock of somebody else's right after ours, as one does
// that looked just before.
type lateLocker struct {
	backend.Backend
	exclusive func()
}

func (b *lateLocker) Save(ctx context.Context, h backend.Handle, data []byte) error {
	err := b.Backend.Save(ctx, h, data)
	if exclusive := b.exclusive; h.Type == backend.LockFile && exclusive != nil {
		b.exclusive = nil
		exclusive()
	}
	return err
}

func TestALockAheadHoldsBackWritesUntilItIsCertain(t *testing.T) {
	for _, refused := range []bool{false, true} {
		t.Run(fmt.Sprintf("refused=%t", refused), func(t *testing.T) {
			other, dir := newRepo(t, Options{})
			be, err := local.Open(dir, local.Options{})
			if err != nil {
				t.Fatal(err)
			}
			late := &lateLocker{Backend: be}
			r, err := Open(t.Context(), late, testPassword, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if refused {
				late.exclusive = func() {
					if _, err := other.saveLock(t.Context(), newLockFile(true)); err != nil {
						t.Error(err)
					}
				}
			}
			l, err := r.LockAhead(t.Context())
			if refused && errors.Is(err, ErrLocked) {
				t.Skip("the disk took so long that nothing may be read ahead")
			}
			if err != nil {
				t.Fatal(err)
			}
			w := r.NewWriter(l.Context(), WriterOptions{Ready: l.Settled})
			if _, err := w.SaveBlob(l.Context(), KindData, []byte("a blob")); err != nil {
				t.Fatal(err)
			}
			err = w.Flush(l.Context())
			settled := l.Settled(t.Context())
			w.Abort()
			packs, globErr := filepath.Glob(filepath.Join(dir, "data", "*", "*"))
			if globErr != nil {
				t.Fatal(globErr)
			}
			if refused {
				if !errors.Is(err, ErrLocked) || !errors.Is(settled, ErrLocked) || !errors.Is(context.Cause(l.Context()), ErrLocked) || len(packs) != 0 {
					t.Errorf("flush: %v, settled: %v, context: %v, packs %v", err, settled, context.Cause(l.Context()), packs)
				}
			} else if err != nil || settled != nil || len(packs) != 1 {
				t.Errorf("flush: %v, settled: %v, packs %v", err, settled, packs)
			}
			if err := l.Unlock(); err != nil {
				t.Error(err)
			}
			left := 0
			if refused {
				left = 1 // the other one's
			}
			if names := lockNames(t, dir); len(names) != left {
				t.Errorf("left: %v", names)
			}
		})
	}
}
