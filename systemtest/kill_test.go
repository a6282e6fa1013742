// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/freeze"
)

// killBackup is what gets killed: slow enough that the freeze lasts a while.
var killBackup = []string{"-q", "backup", "--json", "--snapshot", "freeze", "--limit-upload", "16384", "--pack-size", "4"}

// busyWriter writes to a file system until it is stopped. While that is frozen
// it hangs, as any program does.
type busyWriter struct {
	stop chan struct{}
	wg   sync.WaitGroup
}

func (d *disk) busyWriter(seed uint64) *busyWriter {
	w := &busyWriter{stop: make(chan struct{})}
	w.wg.Go(func() {
		c := newContent(rand.New(rand.NewPCG(seed, 1)), true)
		b := make([]byte, 64<<10)
		for i := 0; ; i++ {
			select {
			case <-w.stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			c.fill(b)
			if err := os.WriteFile(filepath.Join(d.mnt, "busy"+strconv.Itoa(i%64)), b, 0o644); err != nil {
				d.t.Errorf("write during a backup: %v", err)
				return
			}
		}
	})
	return w
}

func (w *busyWriter) end() {
	close(w.stop)
	w.wg.Wait()
}

// watchdogs lists the processes of our command that may freeze something.
func watchdogs(t testing.TB) (pids []int) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		exe, err := os.Readlink(filepath.Join(dir, "exe"))
		if err != nil || exe != dsync {
			continue // gone, or not ours
		}
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err == nil && bytes.Contains(line, []byte(freeze.WatchdogArg)) {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			pids = append(pids, pid)
		}
	}
	return pids
}

// killRounds is the ground of the tests that kill.
type killRounds struct {
	*env
	t testing.TB
	r *rand.Rand
	c *content
	d *disk

	takes, stands time.Duration // a whole backup, and its freeze
}

func startKillRounds(t *testing.T) *killRounds {
	r := random(t)
	k := &killRounds{env: lightEnv(t), t: t, r: r, c: newContent(r, true)}
	k.d = frozenDisk(t, k.env, k.c, 112<<20)
	k.change()
	// How long one takes when nobody kills it.
	began := time.Now()
	w := k.d.busyWriter(r.Uint64())
	s := k.backup(append(slices.Clone(killBackup[3:]), k.d.path)...)
	k.takes, k.stands = time.Since(began), time.Duration(s.FreezeSeconds*float64(time.Second))
	w.end()
	t.Logf("a backup takes %v and freezes for %v", k.takes, k.stands)
	return k
}

// change writes what the next backup has to read under the freeze.
func (k *killRounds) change() {
	k.t.Helper()
	fillFile(k.t, filepath.Join(k.d.mnt, "large"+strconv.Itoa(k.r.IntN(3))), k.c, 16<<20)
}

// inFreeze waits until the file system is frozen, or the backup is at its end.
func (k *killRounds) inFreeze(b *running) bool {
	k.t.Helper()
	image := open(k.t, k.d.file)
	for !b.ended() {
		if frozen(k.t, image) {
			return true
		}
		time.Sleep(200 * time.Microsecond)
	}
	return false
}

// thaws checks that nothing is frozen any more, and nobody is left to freeze.
func (k *killRounds) thaws(w *busyWriter) {
	k.t.Helper()
	k.d.writable()
	w.end() // it hangs if the file system is frozen
	wait(k.t, "the watchdog to leave", func() bool { return len(watchdogs(k.t)) == 0 })
	if frozen(k.t, open(k.t, k.d.file)) {
		k.t.Fatal("the file system is frozen")
	}
}

// goesOn checks the repository, and that the next backup is incremental and
// right.
func (k *killRounds) goesOn(round int) {
	k.t.Helper()
	check := func() {
		k.t.Helper()
		k.must("unlock")
		if locks := k.files("locks"); len(locks) > 0 {
			k.t.Errorf("the lock of a dead process is taken for a live one's: %v", locks)
		}
		if round%5 < 2 || os.Getenv("SOAK") == "1" { // what is broken stays broken
			k.restic([]string{"0.14", "0.18"}[round/4%2], "check")
		}
	}
	if round%2 == 0 {
		check() // else the next backup finds the lock of the dead one
	}
	// A process that is just dying may hold the mount for a moment.
	wait(k.t, "the mount to be free", func() bool { return unix.Unmount(k.d.mnt, 0) == nil })
	if s := k.backup(k.d.path); s.Changes != snapshot.ChangesTracker {
		k.t.Errorf("the next backup is from %s: %s", s.Changes, s.FallbackReason)
	}
	k.sameAtRest(k.d)
	k.d.mount()
	if round%2 == 1 {
		check()
	}
}

func TestAKilledBackupLeavesNothingFrozenAndLosesNothing(t *testing.T) {
	k := startKillRounds(t)
	rounds := count(50, 15)
	inFreeze, finished := 0, 0
	for i := range rounds {
		k.change()
		w := k.d.busyWriter(k.r.Uint64())
		b := k.start(append(killBackup, k.d.path)...)
		if i%3 == 0 { // in the freeze, for certain
			if k.inFreeze(b) {
				time.Sleep(time.Duration(k.r.Float64() * 0.8 * float64(k.stands)))
			}
		} else { // anywhere: each part of the time has its turn
			at := (float64(i) + k.r.Float64()) / float64(rounds)
			time.Sleep(time.Duration(at * float64(k.takes)))
		}
		if frozen(t, open(t, k.d.file)) {
			inFreeze++
		}
		_ = b.cmd.Process.Kill() // it may have ended
		if r := b.result(); r.code == 0 {
			finished++
		} else if r.code != -1 || strings.Contains(r.stdout, "summary") {
			t.Fatalf("round %d: killed, and ended with %+v", i, r)
		}
		k.thaws(w)
		k.goesOn(i)
	}
	k.check()
	t.Logf("%d kills, %d of them during the freeze; %d backups were done before", rounds-finished, inFreeze, finished)
	if inFreeze < rounds/4 || rounds-finished < rounds/2 {
		t.Errorf("too few kills came in time")
	}
}

func TestASignalDuringTheFreezeThawsAndFails(t *testing.T) {
	k := startKillRounds(t)
	for i, c := range []struct {
		name     string
		watchdog bool // else the backup itself
		signal   syscall.Signal
		code     int
		says     string
	}{
		{"WatchdogKilled", true, syscall.SIGKILL, 1, "watchdog ended early"},
		{"WatchdogTerminated", true, syscall.SIGTERM, 1, "watchdog ended early: it was terminated"},
		{"Interrupted", false, syscall.SIGINT, 130, "interrupted"},
	} {
		k.change()
		w := k.d.busyWriter(k.r.Uint64())
		before := len(k.files("snapshots"))
		b := k.start(append(killBackup, k.d.path)...)
		if !k.inFreeze(b) {
			t.Fatalf("%s: no freeze: %+v", c.name, b.result())
		}
		pids := watchdogs(t)
		if len(pids) != 1 {
			t.Fatalf("%s: watchdogs %v during a freeze, want one", c.name, pids)
		}
		if !c.watchdog {
			pids[0] = b.cmd.Process.Pid
		}
		if err := syscall.Kill(pids[0], c.signal); err != nil {
			t.Fatal(err)
		}
		said(t, b.result(), true, false, c.code, c.says)
		if n := len(k.files("snapshots")); n != before {
			t.Errorf("%s: a snapshot was saved all the same", c.name)
		}
		k.thaws(w)
		if locks := k.files("locks"); len(locks) > 0 {
			t.Errorf("%s: locks are left: %v", c.name, locks)
		}
		k.goesOn(i)
	}
	k.check()
}
