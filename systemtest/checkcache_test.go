// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// checkCaches are the folders that checks have made for themselves.
func (e *env) checkCaches() []string {
	e.t.Helper()
	for _, v := range e.vars {
		if dir, ok := strings.CutPrefix(v, "DSYNC_CACHE_DIR="); ok {
			names, err := filepath.Glob(filepath.Join(dir, "check-*"))
			if err != nil {
				e.t.Fatal(err)
			}
			return names
		}
	}
	e.t.Fatal("no cache")
	return nil
}

// locked says whether somebody holds the only one of some folders.
func locked(dirs []string) bool {
	if len(dirs) != 1 {
		return false
	}
	f, err := os.Open(dirs[0])
	if err != nil {
		return false
	}
	defer f.Close()
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == syscall.EWOULDBLOCK
}

// TestTheCacheOfAKilledCheckIsRemovedByTheNext, and that of one which runs is not.
func TestTheCacheOfAKilledCheckIsRemovedByTheNext(t *testing.T) {
	e := localEnv(t)
	// A check that waits for its password has its folder already.
	fifo := filepath.Join(t.TempDir(), "password")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	waiting := e.command("check", "--password-file", fifo)
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = waiting.Process.Kill()
		_ = waiting.Wait()
	})
	for deadline := time.Now().Add(time.Minute); !locked(e.checkCaches()); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("still waiting for the folder of the check")
		}
	}
	its := e.checkCaches()
	e.must("check")
	if now := e.checkCaches(); !slices.Equal(now, its) {
		t.Fatalf("beside a check that runs: %q, its own is %q", now, its)
	}
	if err := os.WriteFile(filepath.Join(its[0], "something"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := waiting.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = waiting.Wait()
	if now := e.checkCaches(); !slices.Equal(now, its) {
		t.Fatalf("a check that was killed has removed its folder: %q", now)
	}
	e.must("check")
	if now := e.checkCaches(); len(now) != 0 {
		t.Errorf("left behind: %q", now)
	}
}
