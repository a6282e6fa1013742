// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

// frozenDisk is a tracked device with a mounted ext4 file system that was
// backed up once.
func frozenDisk(t testing.TB, e *env, c *content, size int64) *disk {
	t.Helper()
	d := newDisk(t, size)
	d.mkfs("ext4")
	fillFile(t, filepath.Join(d.mnt, "old"), c, 4<<20)
	d.track(e)
	e.backup(d.path, "--snapshot", "freeze")
	return d
}

// writable fails the test if a write to the file system does not come to its
// end: it is frozen.
func (d *disk) writable() {
	d.t.Helper()
	done := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(filepath.Join(d.mnt, "written"), os.O_CREATE|os.O_WRONLY|os.O_SYNC, 0o644)
		if err == nil {
			_, err = f.WriteString(time.Now().String())
			f.Close()
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			d.t.Fatal(err)
		}
	case <-time.After(time.Minute):
		run(d.t, "fsfreeze", "-u", d.mnt)
		d.t.Fatalf("%s is frozen", d.mnt)
	}
}

// settles checks what must hold after a backup failed: the file system can be
// written, and the next backup, of a device at rest, is incremental and right.
func (e *env) settles(d *disk) {
	e.t.Helper()
	d.writable()
	d.umount()
	defer d.mount()
	if s := e.backup(d.path); s.Changes != snapshot.ChangesTracker {
		e.t.Errorf("the next backup is from %s: %s", s.Changes, s.FallbackReason)
	}
	e.sameAtRest(d)
}

// sameAtRest restores the latest snapshot and compares it with an unmounted
// device.
func (e *env) sameAtRest(d *disk) {
	e.t.Helper()
	file := e.restored("latest")
	same(e.t, d.file, file)
	if err := os.Remove(file); err != nil {
		e.t.Fatal(err)
	}
}

func TestAMountedDeviceNeedsAChoice(t *testing.T) {
	e := lightEnv(t)
	c := newContent(random(t), false)
	d := frozenDisk(t, e, c, 64<<20)
	other := newDisk(t, 64<<20)
	other.mkfs("ext4")
	where := "mounted read-write .*" + regexp.QuoteMeta(other.mnt)
	e.fails(1, where+".*track start.*--snapshot freeze.*--snapshot none", "backup", other.path)
	e.fails(1, "nothing tracks it.*track start.*--snapshot freeze", "backup", other.path, "--snapshot", "precopy")
	if s := e.backup(d.path); s.PointInTime != string(snapshot.PointInTimePrecopy) || s.FreezeSeconds <= 0 {
		t.Errorf("a tracked device that is mounted is a point in time by %q", s.PointInTime)
	}
	e.fails(1, `"dw" is not one of`, "backup", d.path, "--snapshot", "dw")
	if s := e.backup(d.path, "--snapshot", "none"); s.PointInTime != string(snapshot.PointInTimeNone) {
		t.Errorf("--snapshot none of a mounted device is a point in time by %q", s.PointInTime)
	}
	run(t, "mount", "-o", "remount,ro", d.mnt)
	if s := e.backup(d.path); s.PointInTime != string(snapshot.PointInTimeReadOnly) {
		t.Errorf("a device that is mounted read-only is a point in time by %q", s.PointInTime)
	}
	e.sameAtRest(d)

	// Somebody else holds it frozen: that is theirs to thaw.
	run(t, "mount", "-o", "remount,rw", d.mnt)
	fillFile(t, filepath.Join(d.mnt, "new"), c, 1<<20)
	run(t, "fsfreeze", "-f", d.mnt)
	e.fails(1, "already frozen", "backup", d.path, "--snapshot", "freeze")
	if !frozen(t, open(t, d.file)) {
		t.Error("somebody else's freeze was ended")
	}
	run(t, "fsfreeze", "-u", d.mnt)
	e.settles(d)
}

func TestAFreezeThatTakesTooLongThawsAndLosesNothing(t *testing.T) {
	e := lightEnv(t)
	c := newContent(random(t), false)
	d := frozenDisk(t, e, c, 256<<20)
	// Several times what packs and pipeline hold in memory, on any number of
	// cores: reading has to wait for the upload, for minutes.
	fillFile(t, filepath.Join(d.mnt, "new"), c, 192<<20)
	e.fails(1, "freeze took too long: more than 1s", "backup", d.path, "--snapshot", "freeze", "--max-freeze", "1s", "--limit-upload", "1024", "--pack-size", "4")
	if n := len(e.files("snapshots")); n != 1 {
		t.Errorf("%d snapshots, want 1", n)
	}
	if locks := e.files("locks"); len(locks) > 0 {
		t.Errorf("locks are left: %v", locks)
	}
	e.settles(d)
	e.check()
}

func TestARepositoryOnTheFrozenFileSystemIsRefused(t *testing.T) {
	d := newDisk(t, 128<<20)
	d.mkfs("ext4")
	e := newEnv(t, filepath.Join(d.mnt, "deep", "repo"))
	e.initLight()
	e.fails(1, "lies on "+regexp.QuoteMeta(d.mnt)+", which would be frozen", "backup", d.path, "--snapshot", "freeze")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(e.repo, link); err != nil {
		t.Fatal(err)
	}
	e.fails(1, "would be frozen", "-r", link, "backup", d.path, "--snapshot", "freeze")
	d.writable()
}

// Whatever of ours lies on the frozen file system, and whoever writes our
// output there, nothing waits for the freeze.
func TestStateCacheAndOutputMayLieOnTheFrozenFileSystem(t *testing.T) {
	outside := lightEnv(t)
	c := newContent(random(t), false)
	d := newDisk(t, 128<<20)
	d.mkfs("ext4")
	on := func(name string) string { return filepath.Join(d.mnt, name) }
	e := *outside
	e.vars = append(append([]string{}, outside.vars...),
		"DSYNC_STATE_DIR="+on("state"), "DSYNC_CACHE_DIR="+on("cache"), "TMPDIR="+on("tmp"))
	if err := os.Mkdir(on("tmp"), 0o755); err != nil {
		t.Fatal(err)
	}
	d.track(&e)
	e.backup(d.path, "--snapshot", "freeze")
	if n := len(run(t, "find", on("state"), "-type", "f")); n == 0 {
		t.Fatal("nothing was written to the state directory")
	}
	for i, flags := range [][]string{{"--json"}, {"-v", "-v"}, {"--json", "-v", "-v"}} {
		fillFile(t, on("new"), c, 16<<20)
		out, err := os.Create(on("output"))
		if err != nil {
			t.Fatal(err)
		}
		// The upload is slow, so that there is progress to print.
		cmd := e.command(append(flags, "backup", d.path, "--snapshot", "freeze", "--limit-upload", "8192", "--pack-size", "4")...)
		cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, d.mnt
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case err = <-ended:
		case <-time.After(2 * time.Minute):
			run(t, "fsfreeze", "-u", d.mnt)
			err = <-ended
			t.Errorf("the backup hangs on the frozen file system")
		}
		out.Close()
		text, readErr := os.ReadFile(on("output"))
		if err != nil || readErr != nil {
			t.Fatalf("backup %v: %v %v\n%s", flags, err, readErr, text)
		}
		if flags[0] == "--json" {
			lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
			s := summary(t, string(lines[len(lines)-1]))
			if s.Changes != snapshot.ChangesTracker || s.FreezeSeconds <= 0 {
				t.Errorf("changes are from %s (%s), frozen for %v s", s.Changes, s.FallbackReason, s.FreezeSeconds)
			}
		} else if !strings.Contains(string(text), "were frozen for") {
			t.Errorf("round %d: the output says nothing of the freeze:\n%s", i, text)
		}
		e.consistent()
	}
	// By a pipe to a process that cannot write, its output there included.
	fillFile(t, on("new"), c, 16<<20)
	e.pipedTo(d, on("piped"))
	e.consistent()
	d.writable()

	// The state went with the mount: the backup says so, and compares.
	d.umount()
	s := e.backup(d.path)
	if s.Changes != snapshot.ChangesCompare || !strings.Contains(s.FallbackReason, "is not in the log") {
		t.Errorf("the next backup is from %s: %q", s.Changes, s.FallbackReason)
	}
	e.sameAtRest(d)
	e.check()
}

// consistent restores the latest snapshot and checks its file system, which a
// freeze leaves clean.
func (e *env) consistent() {
	e.t.Helper()
	file := e.restored("latest")
	run(e.t, "e2fsck", "-fn", file)
	if err := os.Remove(file); err != nil {
		e.t.Fatal(err)
	}
}

// pipedTo runs a verbose backup whose output goes through a full pipe to a
// writer on the frozen file system.
func (e *env) pipedTo(d *disk, file string) {
	e.t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		e.t.Fatal(err)
	}
	rd, wr := os.NewFile(uintptr(fds[0]), "read"), os.NewFile(uintptr(fds[1]), "write")
	defer rd.Close()
	if _, err := unix.FcntlInt(wr.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		e.t.Fatal(err)
	}
	cat := e.prepare("sh", "-c", "exec cat >"+file)
	cat.Stdin = rd
	cmd := e.command("--json", "-v", "-v", "backup", d.path, "--snapshot", "freeze", "--limit-upload", "8192", "--pack-size", "4")
	cmd.Stdout, cmd.Stderr = wr, wr
	if err := cat.Start(); err != nil {
		e.t.Fatal(err)
	}
	err := cmd.Run()
	wr.Close()
	if catErr := cat.Wait(); err != nil || catErr != nil {
		e.t.Fatalf("backup: %v, its reader: %v", err, catErr)
	}
	text, err := os.ReadFile(file)
	if err != nil || !strings.Contains(string(text), `"message_type":"summary"`) {
		e.t.Fatalf("the reader got no summary: %v\n%s", err, text)
	}
}
