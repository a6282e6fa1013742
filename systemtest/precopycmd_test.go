// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

// TestPrecopyThatWouldFreezeTooLongFailsCleanly allows no freeze that could be
// kept: either the copies do not catch up, or the freeze is cut short.
func TestPrecopyThatWouldFreezeTooLongFailsCleanly(t *testing.T) {
	e := lightEnv(t)
	c := newContent(random(t), false)
	d := frozenDisk(t, e, c, 256<<20)
	stop := d.writers(c.r)
	fillFile(t, filepath.Join(d.mnt, "new"), c, 40<<20)
	r := e.try("-q", "backup", d.path, "--snapshot", "precopy", "--max-freeze", "1ms")
	said(t, r, false, false, 1, "written to faster than it is copied: after [0-9]+ copies .* are left.*--max-freeze|freeze took too long: more than 1ms")
	stop()
	if n := len(e.files("snapshots")); n != 1 {
		t.Errorf("%d snapshots, want 1", n)
	}
	if locks := e.files("locks"); len(locks) > 0 {
		t.Errorf("locks are left: %v", locks)
	}
	e.settles(d)
	e.check()
}

// TestTheCommandsPrecopyIsTheDeviceAtTheFreeze has the built command freeze,
// and copies the truth while it is stopped in the freeze.
func TestTheCommandsPrecopyIsTheDeviceAtTheFreeze(t *testing.T) {
	e := lightEnv(t)
	c := newContent(random(t), true)
	d := frozenDisk(t, e, c, 256<<20)
	truth := truthFile(t)
	for range count(10, 3) {
		stop := d.writers(c.r)
		s := d.backupPrecopied(e, truth)
		stop()
		if s.Changes != snapshot.ChangesTracker || s.Rounds < 1 {
			t.Errorf("%+v", s)
		}
		t.Logf("%d copies, read %d, dirty %d, frozen for %.3f s", s.Rounds, s.BytesRead, s.DirtyBytes, s.FreezeSeconds)
		e.restoresTo(s.SnapshotID.String(), truth)
		if st := e.tracked(d); !st.Reliable {
			t.Errorf("the tracker is not reliable: %s", st.Reason)
		}
	}
	// Nothing was lost on the way to a state of rest, either.
	e.settles(d)
	e.check()
}

// killPrecopy is what gets killed: slow enough to be caught everywhere.
var killPrecopy = []string{"-q", "backup", "--json", "--snapshot", "precopy", "--limit-upload", "16384", "--pack-size", "4"}

func TestAKilledPrecopyLeavesNothingFrozenAndLosesNothing(t *testing.T) {
	k := startKillRounds(t)
	k.change()
	began := time.Now()
	w := k.d.busyWriter(k.r.Uint64())
	s := k.backup(append(slices.Clone(killPrecopy[3:]), k.d.path)...)
	takes := time.Since(began)
	w.end()
	t.Logf("a backup takes %v, in %d copies, and freezes for %v s", takes, s.Rounds, s.FreezeSeconds)
	rounds := count(50, 10)
	inFreeze, finished := 0, 0
	for i := range rounds {
		k.change()
		w := k.d.busyWriter(k.r.Uint64())
		b := k.start(append(killPrecopy, k.d.path)...)
		if i%3 == 0 { // in the freeze, if it is seen in time
			k.inFreeze(b)
		} else {
			at := (float64(i) + k.r.Float64()) / float64(rounds)
			time.Sleep(time.Duration(at * float64(takes)))
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
	if rounds-finished < rounds/2 {
		t.Errorf("too few kills came in time")
	}
}

// State, cache and output may lie on the file system that is copied, and
// frozen in the end.
func TestPrecopyOfTheFileSystemWithOurState(t *testing.T) {
	outside := lightEnv(t)
	c := newContent(random(t), false)
	d := newDisk(t, 256<<20)
	d.mkfs("ext4")
	on := func(name string) string { return filepath.Join(d.mnt, name) }
	e := *outside
	e.vars = append(append([]string{}, outside.vars...), "DSYNC_STATE_DIR="+on("state"), "DSYNC_CACHE_DIR="+on("cache"))
	d.track(&e)
	for i := range 3 {
		fillFile(t, on("new"), c, 40<<20)
		out, err := os.Create(on("output"))
		if err != nil {
			t.Fatal(err)
		}
		cmd := e.command("--json", "-v", "-v", "backup", d.path, "--snapshot", "precopy")
		cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, d.mnt
		err = cmd.Run()
		out.Close()
		text, readErr := os.ReadFile(on("output"))
		if err != nil || readErr != nil {
			t.Fatalf("backup: %v %v\n%s", err, readErr, text)
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		s := summary(t, lines[len(lines)-1])
		if s.Rounds < 2 || s.FreezeSeconds <= 0 || i > 0 && s.Changes != snapshot.ChangesTracker {
			t.Errorf("%+v", s)
		}
		e.consistent()
	}
	d.writable()
	on2 := newEnv(t, on("repo"))
	on2.initLight()
	on2.fails(1, "which would be frozen", "backup", d.path, "--snapshot", "precopy")
	e.check()
}
