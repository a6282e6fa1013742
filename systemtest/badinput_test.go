// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// said checks how a command failed: the exit code, one line on standard error
// that matches want, and nothing of the program's inside. With --json the line
// is an object. Warnings may come before it if warned is set.
func said(t testing.TB, r result, asJSON, warned bool, code int, want string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	line := lines[len(lines)-1]
	if r.code != code || len(lines) != 1 && !warned || strings.Contains(r.stderr, "goroutine ") || strings.Contains(r.stderr, "panic") {
		t.Errorf("exit code %d, want %d and one line:\n%s", r.code, code, r.stderr)
	}
	text, ok := strings.CutPrefix(line, "dsync-backup: ")
	if asJSON {
		var o struct {
			MessageType string `json:"message_type"`
			Code        int    `json:"code"`
			Message     string `json:"message"`
		}
		err := json.Unmarshal([]byte(line), &o)
		ok, text = err == nil && o.MessageType == "exit_error" && o.Code == code, o.Message
	}
	if !ok || !regexp.MustCompile(want).MatchString(text) || len(text) > 500 {
		t.Errorf("it says %q, want something like %q", line, want)
	}
	t.Logf("%d: %s", r.code, line)
}

// fails runs a command that must fail, for people and with --json.
func (e *env) fails(code int, want string, args ...string) {
	e.t.Helper()
	said(e.t, e.try(append([]string{"-q"}, args...)...), false, false, code, want)
	r := e.try(append([]string{"--json", "-q"}, args...)...)
	said(e.t, r, true, false, code, want)
	if strings.Contains(r.stdout, `"summary"`) {
		e.t.Errorf("a command that fails prints a summary: %s", r.stdout)
	}
}

// image makes an image file with content.
func image(t testing.TB, c *content, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	fillRange(t, direct(t, path), c, 0, size)
	return path
}

// snapshotIDs lists the IDs of the snapshots.
func (e *env) snapshotIDs() (ids []string) {
	e.t.Helper()
	var list []struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal([]byte(e.must("snapshots", "--json")), &list); err != nil {
		e.t.Fatal(err)
	}
	for _, s := range list {
		ids = append(ids, s.ID)
	}
	return ids
}

func writeFile(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBadInputIsRefusedInOneLine(t *testing.T) {
	e := localEnv(t)
	img := image(t, newContent(random(t), false), 3<<20)
	e.backup(img)
	before := stored(t, e.repo)
	subtest := func(name string, code int, want string, args ...string) {
		t.Run(name, func(t *testing.T) {
			sub := *e
			sub.t = t
			sub.fails(code, want, args...)
		})
	}
	wrong := writeFile(t, "falsch\n")
	subtest("WrongPasswordBackup", 12, "wrong password", "backup", img, "--password-file", wrong)
	subtest("WrongPasswordRestore", 12, "wrong password", "restore", "latest", filepath.Join(t.TempDir(), "x"), "-p", wrong)
	subtest("WrongPasswordSnapshots", 12, "wrong password", "snapshots", "-p", wrong)
	subtest("NoPasswordFile", 1, "no such file", "snapshots", "-p", "/nowhere")
	subtest("NoRepository", 10, "no repository", "-r", filepath.Join(t.TempDir(), "none"), "backup", img)
	subtest("NotARepository", 10, "no repository", "-r", t.TempDir(), "snapshots")
	subtest("InitTwice", 1, "already", "init")

	subtest("NoDevice", 1, "/dev/nowhere: no such file", "backup", "/dev/nowhere")
	subtest("Directory", 1, "neither a block device nor a regular file", "backup", t.TempDir())
	subtest("CharacterDevice", 1, "/dev/zero: neither a block device nor", "backup", "/dev/zero")
	subtest("NotTracked", 1, "cannot be tracked", "backup", img, "--changes", "tracker")

	subtest("NoRanges", 1, "no such file", "backup", img, "--changes", "rangez")
	for name, text := range map[string]string{
		"Garbage": "rm -rf /", "Binary": "\x00\xff\xfe", "NoLength": `{"offset":0}`, "Negative": `{"offset":-4096,"length":4096}`,
		"BeyondTheEnd": `{"offset":3141632,"length":8192}`, "Overflow": `{"offset":9223372036854771712,"length":8192}`,
		"Text": `{"offset":"0","length":1}`, "List": `[1,2]`, "Fraction": `{"offset":0.5,"length":1}`, "LongLine": strings.Repeat(" x", 1<<20),
	} {
		// A good line before it does not help.
		list := writeFile(t, `{"offset":0,"length":4096}`+"\n"+text+"\n")
		subtest("Ranges"+name, 1, "read changed ranges: ", "backup", img, "--changes", list)
	}
	subtest("RangesWithoutAParent", 1, "--changes full first", "backup", img, "--name", "/other", "--changes", writeFile(t, ""))

	subtest("UnknownSnapshot", 1, "no snapshot found", "restore", strings.Repeat("0", 64), filepath.Join(t.TempDir(), "x"))
	subtest("NoSnapshotID", 1, "not an ID", "restore", "newest", filepath.Join(t.TempDir(), "x"))
	subtest("LatestOfNothing", 1, "no snapshot found", "restore", "latest", "--host", "other", filepath.Join(t.TempDir(), "x"))
	subtest("UnknownCommand", 1, "frobnicate", "frobnicate")
	subtest("UnknownFlag", 1, "--frob", "backup", "--frob", img)
	subtest("NoArgument", 1, "arg", "backup")
	subtest("BadName", 1, "not an absolute path", "backup", img, "--name", "x")

	t.Run("NothingWasTouched", func(t *testing.T) {
		if len(e.files("locks")) > 0 || stored(t, e.repo) != before {
			t.Errorf("the repository grew by %d bytes, locks %v", stored(t, e.repo)-before, e.files("locks"))
		}
		e.check()
		same(t, img, e.restored("latest"))
	})
}

func TestAPrefixOfTwoSnapshotsIsAmbiguous(t *testing.T) {
	e := lightEnv(t)
	img := image(t, newContent(random(t), false), 1<<20)
	seen := map[string]bool{}
	for range 17 { // there are 16 digits
		id := e.backup(img).SnapshotID.String()
		if seen[id[:1]] {
			e.fails(1, "give more of it$", "restore", id[:1], filepath.Join(t.TempDir(), "x"))
			same(t, img, e.restored(id[:12]))
			return
		}
		seen[id[:1]] = true
	}
	t.Fatalf("17 IDs without a common digit: %v", seen)
}

func TestATargetIsOnlyOverwrittenWhenThatIsSafe(t *testing.T) {
	e := lightEnv(t)
	c := newContent(random(t), false)
	img := image(t, c, 16<<20)
	e.backup(img)
	small, used, mounted := newDisk(t, 8<<20), newDisk(t, 16<<20), newDisk(t, 64<<20)
	fillRange(t, direct(t, used.path), c, 8<<20, 1<<20)
	mounted.mkfs("ext4")
	was := image(t, c, 1<<20)
	run(t, "cp", used.file, was)

	e.fails(1, "too small: .* has 8388608 bytes, the snapshot's device has 16777216", "restore", "latest", small.path)
	e.fails(1, "too small", "restore", "--force", "latest", small.path)
	e.fails(1, "mounted at "+regexp.QuoteMeta(mounted.mnt), "restore", "latest", mounted.path)
	e.fails(1, "mounted at "+regexp.QuoteMeta(mounted.mnt), "restore", "--force", "latest", mounted.path)
	e.fails(1, "only with --force", "restore", "latest", used.path)
	e.fails(1, "no device", "restore", "latest", "/dev/nowhere")
	e.fails(1, "restore to", "restore", "latest", "/nowhere/file")
	e.fails(1, "inside of the repository", "restore", "latest", filepath.Join(e.repo, "disk.img"))
	e.fails(1, "restore to", "restore", "latest", t.TempDir())
	used.copyTo(was + "2")
	same(t, was, was+"2") // not a byte of it was touched

	e.must("restore", "--force", "latest", used.path)
	run(t, "cmp", img, used.path)
}

func TestADeviceThatCannotBeReadFailsAndLeavesNoSnapshot(t *testing.T) {
	e, d := lightEnv(t), newDisk(t, 64<<20)
	c := newContent(random(t), false)
	fillRange(t, direct(t, d.path), c, 0, 64<<20)
	d.track(e)
	first := e.backup(d.path)
	good := filepath.Join(t.TempDir(), "good.img")
	d.copyTo(good)

	// Reads behind the end of the backing file are errors of the disk.
	if err := os.Truncate(d.file, 48<<20); err != nil {
		t.Fatal(err)
	}
	e.fails(1, `read /dev/loop\d+, bytes 50331648 to 50335743: input/output error`, "backup", d.path, "--changes", "full")
	e.fails(1, `input/output error`, "backup", d.path, "--changes", "compare")
	if ids := e.snapshotIDs(); len(ids) != 1 {
		t.Errorf("there are snapshots %v, want one", ids)
	}
	// The disk is well again.
	if err := os.Truncate(d.file, 64<<20); err != nil {
		t.Fatal(err)
	}
	fillRange(t, direct(t, d.path), c, 48<<20, 16<<20)
	if s := e.backup(d.path); s.Changes != "tracker" {
		t.Errorf("the next backup is from %s: %s", s.Changes, s.FallbackReason)
	}
	same(t, d.file, e.restored("latest"))
	same(t, good, e.restored(first.SnapshotID.String()))
	e.check()
}

func TestAnExclusiveLockOfResticIsHonoured(t *testing.T) {
	e := lightEnv(t)
	img := image(t, newContent(random(t), false), 8<<20)
	e.backup(img)
	// A check holds an exclusive lock, and at this rate for two minutes.
	check := e.prepare(restics["0.18"], "check", "--read-data", "--limit-download", "64", "--no-cache")
	if err := check.Start(); err != nil {
		t.Fatal(err)
	}
	wait(t, "restic's lock", func() bool { return len(e.files("locks")) > 0 })
	time.Sleep(time.Second) // restic looks at other locks once more
	want := fmt.Sprintf("locked exclusively by PID %d ", check.Process.Pid)
	e.fails(11, want, "backup", img)
	e.fails(11, want, "restore", "latest", filepath.Join(t.TempDir(), "x"))
	if n := len(e.files("locks")); n != 1 {
		t.Errorf("there are %d locks, want restic's alone", n)
	}

	done := make(chan result, 1)
	go func() { done <- finish(t, e.command("-q", "backup", img, "--retry-lock", "5m")) }()
	time.Sleep(time.Second)
	if err := check.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = check.Wait() // killed
	// It may have been in the middle of a prune: only the user can know.
	e.fails(11, "left behind, `unlock` removes", "backup", img)
	e.must("unlock")
	if r := <-done; r.code != 0 {
		t.Errorf("with --retry-lock: exit code %d\n%s", r.code, r.stderr)
	}
	if locks := e.files("locks"); len(locks) > 0 {
		t.Errorf("locks are left: %v", locks)
	}
	if n := len(slices.Compact(e.snapshotIDs())); n != 2 {
		t.Errorf("%d snapshots, want 2", n)
	}
}

// wait waits until something is so; its time limit is no part of any promise.
func wait(t testing.TB, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
