// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// lockBy puts a lock into the repository as a program has one that wrote it so long ago.
func (e *env) lockBy(host string, pid int, age time.Duration, exclusive bool) (file string) {
	e.t.Helper()
	var key crypto.Key
	if err := json.Unmarshal([]byte(e.restic("0.18", "cat", "masterkey", "--no-lock")), &key); err != nil {
		e.t.Fatal(err)
	}
	plain, err := json.Marshal(map[string]any{
		"time": time.Now().Add(-age), "exclusive": exclusive, "hostname": host, "username": "root", "pid": pid,
	})
	if err != nil {
		e.t.Fatal(err)
	}
	sealed := key.Seal(nil, plain)
	sum := sha256.Sum256(sealed)
	file = filepath.Join(e.repo, "locks", hex.EncodeToString(sum[:]))
	if err := os.WriteFile(file, sealed, 0o600); err != nil {
		e.t.Fatal(err)
	}
	return file
}

// leftBehind is when a lock counts as left behind, as people see it.
func (e *env) leftBehind(file string) string {
	e.t.Helper()
	var lock struct{ Time time.Time }
	if err := json.Unmarshal([]byte(e.restic("0.18", "cat", "lock", filepath.Base(file), "--no-lock")), &lock); err != nil {
		e.t.Fatal(err)
	}
	return lock.Time.Add(30*time.Minute).Local().Format(time.DateTime) + " on"
}

// stays makes sure that unlock named the lock if it stays, with the time until which it does.
func (e *env) stays(said, file string, stays bool) {
	e.t.Helper()
	line := "lock " + filepath.Base(file)[:8] + " stays: locked "
	if strings.Contains(said, line) != stays {
		e.t.Errorf("the lock stays: %t, and unlock says %q", stays, said)
	}
	if !stays {
		return
	}
	if at := e.leftBehind(file); !strings.Contains(said, at) {
		e.t.Errorf("unlock says %q, want %q", said, at)
	}
	var sum struct {
		Removed int
		Left    []struct {
			ID      string    `json:"id"`
			StaleAt time.Time `json:"stale_at"`
			Time    time.Time
		}
	}
	out := e.must("unlock", "--json")
	if err := json.Unmarshal([]byte(out), &sum); err != nil || sum.Removed != 0 || len(sum.Left) != 1 || sum.Left[0].ID != filepath.Base(file) ||
		!sum.Left[0].StaleAt.Equal(sum.Left[0].Time.Add(30*time.Minute)) {
		e.t.Errorf("%v: %s", err, out)
	}
}

// TestUnlockRemovesWhatNobodyHolds: a lock goes when its process on this host is gone, or when it
// has not been refreshed for 30 minutes, wherever it is from; else it stays, and keeps a
// backup from working if it is exclusive. restic finds the same.
func TestUnlockRemovesWhatNobodyHolds(t *testing.T) {
	e := lightEnv(t)
	img := image(t, newContent(random(t), false), 1<<20)
	e.backup(img)
	here, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	// restic asks a process by this whether it is there.
	asked := make(chan os.Signal, 10)
	signal.Notify(asked, syscall.SIGHUP)
	defer signal.Stop(asked)
	const other = "another-host"
	for _, c := range []struct {
		name      string
		host      string
		pid       int
		age       time.Duration
		exclusive bool
		stays     bool
	}{
		{"OtherHost", other, os.Getpid(), 0, true, true},
		{"OtherHostNoSuchProcess", other, dead.Process.Pid, 29 * time.Minute, true, true},
		{"OtherHostShared", other, dead.Process.Pid, 0, false, true},
		{"OtherHostOld", other, os.Getpid(), 31 * time.Minute, true, false},
		{"ThisHostAlive", here, os.Getpid(), 0, true, true},
		{"ThisHostDead", here, dead.Process.Pid, 0, true, false},
		{"ThisHostDeadShared", here, dead.Process.Pid, 0, false, false},
		{"ThisHostAliveOld", here, os.Getpid(), 31 * time.Minute, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := *e
			e.t = t
			file := e.lockBy(c.host, c.pid, c.age, c.exclusive)
			// In the way until unlock, stale or not.
			if c.exclusive {
				says := "locked exclusively by PID"
				switch {
				case !c.stays:
					says += ".*looks left behind, `unlock`"
				case c.host == other:
					says += ".*left behind from " + e.leftBehind(file)
				}
				e.fails(11, says, "backup", img)
			} else {
				e.backup(img)
			}
			e.fails(11, "locked ", "prune")

			e.stays(e.must("unlock"), file, c.stays)
			if got := slices.Contains(e.files("locks"), file); got != c.stays {
				t.Fatalf("after unlock the lock is there: %t", got)
			}
			if !c.stays {
				// restic finds so, too.
				file = e.lockBy(c.host, c.pid, c.age, c.exclusive)
			}
			e.restic("0.18", "unlock")
			if got := slices.Contains(e.files("locks"), file); got != c.stays {
				t.Fatalf("after restic's unlock the lock is there: %t", got)
			}
			if c.stays {
				if c.exclusive {
					e.fails(11, "locked exclusively by PID", "backup", img)
				}
				e.fails(11, "locked ", "prune")
				e.must("unlock", "--remove-all")
			}
			e.backup(img)
			e.must("prune")
			if locks := e.files("locks"); len(locks) > 0 {
				t.Errorf("locks are left: %v", locks)
			}
		})
	}
}
