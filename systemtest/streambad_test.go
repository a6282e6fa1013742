// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// extracted is the stream of a disk.
func (e *env) extracted(args ...string) []byte {
	e.t.Helper()
	cmd := e.command(append([]string{"extract"}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		e.t.Fatalf("extract: %v", err)
	}
	return out
}

// merge gives merge a stream.
func (e *env) merge(data []byte, args ...string) result {
	e.t.Helper()
	cmd := e.command(append([]string{"merge"}, args...)...)
	cmd.Stdin = bytes.NewReader(data)
	return finish(e.t, cmd)
}

func (e *env) mustMerge(data []byte, args ...string) {
	e.t.Helper()
	if r := e.merge(data, args...); r.code != 0 {
		e.t.Fatalf("merge: %d %s", r.code, r.stderr)
	}
}

func TestDamagedStreamsLeaveTheTargetIncomplete(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d, other := newDisk(t, streamSize), newDisk(t, streamSize)
	d.scribble(r, 200)
	d.track(e)
	image := filepath.Join(t.TempDir(), "image")
	first, at := e.mustPipe([]string{d.path}, []string{image})
	e.must("extract", "--commit", at, d.path)
	d.scribble(r, 200)
	// One that is cut after the header, so that something is applied.
	data := e.extracted(d.path)
	for i := range count(60, 12) {
		bad, want := data[:len(data)/8+r.IntN(len(data)*7/8)], "ends in the middle"
		if i%2 == 1 {
			bad, want = bytes.Clone(data), "damaged"
			bad[len(data)/8+r.IntN(len(data)*7/8)] ^= 1 << r.IntN(8)
		}
		oneLine(t, e.merge(bad, image), "stream", "incomplete")
		if i%2 == 0 {
			oneLine(t, e.merge(bad, image), want)
		}
		got := e.try("merge", "--position", image)
		if p := strings.TrimSpace(got.stdout); !strings.Contains(p, ",") || !strings.Contains(got.stderr, "incomplete") {
			t.Fatalf("the target is at %q, %s", p, got.stderr)
		}
		if i%3 == 0 {
			e.mustMerge(data, image) // the same again
		} else {
			// What changed since, one more epoch included.
			d.scribble(r, 5)
			p, _, _ := strings.Cut(strings.TrimSpace(e.try("merge", "--position", image).stdout), "\n")
			e.mustMerge(e.extracted("--since", p, d.path), image)
			d.sameAs(image)
			at = strings.TrimSpace(e.must("merge", "--position", image))
			e.must("extract", "--commit", at, d.path)
			d.scribble(r, 100)
			data = e.extracted(d.path)
		}
	}
	// With a spool nothing is applied of what has no end.
	before := filepath.Join(t.TempDir(), "before")
	run(t, "cp", image, before)
	oneLine(t, e.merge(data[:len(data)-1], "--spool", t.TempDir(), image), "nothing of it was applied")
	same(t, before, image)
	e.mustMerge(data, "--spool", t.TempDir(), image)
	d.sameAs(image)
	// Another version, another kind of file, another device's stream.
	bad := bytes.Clone(data)
	bad[8]++
	oneLine(t, e.merge(bad, image), "version")
	oneLine(t, e.merge([]byte("nothing of the kind"), image), "no stream of dsync-backup")
	other.track(e)
	full := e.extracted(other.path)
	oneLine(t, e.merge(full, image), "is a copy of", "--force")
	second := filepath.Join(t.TempDir(), "second")
	e.mustMerge(full, second)
	e.must("extract", "--commit", strings.TrimSpace(e.must("merge", "--position", second)), other.path)
	other.scribble(r, 5)
	oneLine(t, e.merge(e.extracted(other.path), image), "another device's", "--changes compare")
	// An older stream, and one that begins where the target never was.
	old := e.extracted("--changes", "full", d.path)
	e.mustMerge(old, image)
	oneLine(t, e.merge(data, image), "does not follow on", "--changes compare")
	_ = first
	d.sameAs(image)
}

func TestMergeRefusesTargets(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d := newDisk(t, 64<<20)
	d.scribble(r, 50)
	d.track(e)
	mounted, small, full := newDisk(t, 300<<20), newDisk(t, 32<<20), newDisk(t, 300<<20)
	mounted.mkfs("ext4")
	full.mkfs("ext4")
	full.umount()
	data := e.extracted(d.path)
	oneLine(t, e.merge(data, mounted.path), "in use", mounted.mnt)
	oneLine(t, e.try("sync", d.path, mounted.path), "in use", mounted.mnt)
	oneLine(t, e.merge(data, small.path), "too small")
	oneLine(t, e.merge(data, full.path), "ext", "--force")
	oneLine(t, e.try("sync", d.path, full.path), "ext", "--force")
	run(t, "e2fsck", "-fn", full.path)
	oneLine(t, e.try("sync", d.path, d.path), "at once")
	oneLine(t, e.merge(data, filepath.Join(t.TempDir(), "none", "image")), "no such file")
	if sent := e.sync("--force", d.path, full.path); sent.Changes != "compare" {
		t.Fatalf("an unknown target was %s", sent.Changes)
	}
	run(t, "cmp", "-n", "67108864", d.path, full.path)
	d.scribble(r, 5)
	if sent := e.sync(d.path, full.path); sent.Changes != "tracker" {
		t.Fatalf("a known target was %s", sent.Changes)
	}
	run(t, "cmp", "-n", "67108864", d.path, full.path)
}

func TestTargetsThatAreNoLongerTheSame(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d := newDisk(t, 64<<20)
	d.mkfs("ext4")
	d.umount()
	d.track(e)
	dir := t.TempDir()
	image, copied := filepath.Join(dir, "image"), filepath.Join(dir, "copied")
	e.sync(d.path, image)
	// A copy with its state is not the target, and is not written to.
	run(t, "cp", "-a", image, copied)
	run(t, "cp", "-a", image+".dsync-state", copied+".dsync-state")
	oneLine(t, e.try("sync", d.path, copied), "another than the one", "--force")
	// One that was moved with its state is.
	moved := filepath.Join(t.TempDir(), "moved")
	run(t, "mv", image, moved)
	run(t, "mv", image+".dsync-state", moved+".dsync-state")
	d.scribble(r, 5)
	if sent := e.sync(d.path, moved); sent.Changes != "tracker" {
		t.Fatalf("moved: %s", sent.Changes)
	}
	// Somebody writes to the file: its time of change tells, and comparing mends.
	f, err := os.OpenFile(moved, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("not from here"), 33<<20)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	oneLine(t, e.try("sync", d.path, moved), "written to after the last merge", "--force")
	if sent := e.sync("--force", d.path, moved); sent.Changes != "compare" || sent.DataBytes+sent.ZeroBytes != 4096 {
		t.Fatalf("%s, %d bytes", sent.Changes, sent.DataBytes+sent.ZeroBytes)
	}
	d.sameAs(moved)
	// A device that was mounted in between.
	to := newDisk(t, 64<<20)
	e.sync(d.path, to.path)
	to.mount()
	to.umount()
	oneLine(t, e.try("sync", d.path, to.path), "written to", "--force")
	e.sync("--force", d.path, to.path)
	run(t, "cmp", d.path, to.path)
	// One whose blocks were written elsewhere cannot be told: comparing mends.
	if f, err = os.OpenFile(to.path, os.O_RDWR, 0); err == nil {
		_, err = f.WriteAt(bytes.Repeat([]byte("elsewhere"), 1000), 50<<20)
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	e.sync("--force", "--changes", "compare", d.path, to.path)
	run(t, "cmp", d.path, to.path)
}

// TestCompareThroughFiles reconciles two devices that drifted by way of a file of
// sums.
func TestCompareThroughFiles(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d, to := newDisk(t, streamSize), newDisk(t, streamSize)
	d.scribble(r, 200)
	run(t, "cp", "--sparse=never", d.file, to.file)
	drift := d.scribble(r, 10) + to.scribble(r, 10)
	file := filepath.Join(t.TempDir(), "sums")
	sums := func() {
		out, err := e.command("merge", "--sums", to.path).Output()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, out, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sums()
	data := e.extracted("--changes", "compare", "--sums", file, d.path)
	if int64(len(data)) > drift*4096+1<<16 {
		t.Fatalf("%d bytes for %d blocks", len(data), drift)
	}
	oneLine(t, e.merge(data, to.path), "--force")
	sums()
	oneLine(t, e.merge(data, "--force", to.path), "other sums")
	e.mustMerge(e.extracted("--changes", "compare", "--sums", file, d.path), "--force", to.path)
	d.sameAs(to.path)
	out, _ := os.ReadFile(file)
	if err := os.WriteFile(file, out[:len(out)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	oneLine(t, e.quietly("extract", "--changes", "compare", "--sums", file, d.path), "sums", "ends in the middle")
	oneLine(t, e.merge(out, to.path), "sums and no data")
}

// quietly runs a command whose standard output is not looked at.
func (e *env) quietly(args ...string) result {
	cmd := e.command(args...)
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &errs
	_ = cmd.Run()
	return result{cmd.ProcessState.ExitCode(), "", errs.String()}
}

// TestSyncKilled kills either end at any moment; the next sync loses nothing.
func TestSyncKilled(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d, to := newDisk(t, streamSize), newDisk(t, streamSize)
	d.scribble(r, 300)
	d.track(e)
	for i := range count(100, 16) {
		target := to.path
		if i%4 == 3 {
			target = filepath.Join(t.TempDir(), "fresh")
		}
		d.scribble(r, 100)
		cmd := e.command("sync", "-q", d.path, target)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if i%5 == 4 {
			cmd.Args = append(cmd.Args, "--changes", "compare")
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(r.IntN(600)) * time.Millisecond)
		switch i % 3 {
		case 0:
			_ = cmd.Process.Kill()
		case 1:
			killChildren(cmd.Process.Pid)
		default:
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
		_ = cmd.Wait()
		d.scribble(r, 10)
		e.settleSync(d.path, target)
		run(t, "cmp", d.path, target)
	}
}

// settleSync syncs once the target's end of an older one is gone.
func (e *env) settleSync(path, target string) {
	e.t.Helper()
	var r result
	for range 200 {
		if r = e.try("sync", path, target); r.code == 0 {
			return
		}
		if !strings.Contains(r.stderr, "in use") && !strings.Contains(r.stderr, "claimed") {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	e.t.Fatalf("sync: %d %s", r.code, r.stderr)
}

// killChildren kills the processes that a process of ours started.
func killChildren(pid int) {
	out, _ := exec.Command("pgrep", "-P", strconv.Itoa(pid)).Output()
	for _, child := range strings.Fields(string(out)) {
		_ = exec.Command("kill", "-9", child).Run()
	}
}

// TestMergeToAFullDisk runs out of space, and goes on when there is some.
func TestMergeToAFullDisk(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d := newDisk(t, 64<<20)
	d.track(e)
	dir := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	image := filepath.Join(dir, "image")
	e.sync(d.path, image) // sparse
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err == nil {
		b := make([]byte, 20<<20)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		_, err = f.WriteAt(b, 0)
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	oneLine(t, e.try("sync", d.path, image), "no space left", "incomplete")
	oneLine(t, e.try("sync", "--changes", "compare", d.path, image), "no space left", "gave up")
	run(t, "mount", "-o", "remount,size=100m", dir)
	e.sync(d.path, image)
	d.sameAs(image)
}
