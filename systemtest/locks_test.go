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
				if !c.stays {
					says += ".*looks left behind, `unlock`"
				}
				e.fails(11, says, "backup", img)
			} else {
				e.backup(img)
			}
			e.fails(11, "locked ", "prune")

			e.must("unlock")
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
