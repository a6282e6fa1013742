// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/snapshot/extract"
)

const streamSize = 64<<20 + 512 // not whole blocks

// scribble writes to random places of a disk and returns how many blocks it
// touched at most.
func (d *disk) scribble(r *rand.Rand, writes int) (blocks int64) {
	d.t.Helper()
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	size, _ := f.Seek(0, io.SeekEnd)
	c := newContent(r, true)
	for range writes {
		b := make([]byte, 1+r.IntN(40000))
		c.fill(b)
		if r.IntN(5) == 0 {
			clear(b)
		}
		off := r.Int64N(size - int64(len(b)))
		if _, err := f.WriteAt(b, off); err != nil {
			d.t.Fatal(err)
		}
		blocks += (off+int64(len(b))-1)/4096 - off/4096 + 1
	}
	if err := f.Sync(); err != nil {
		d.t.Fatal(err)
	}
	return blocks
}

// pipe runs extract and merge with a pipe between them.
func (e *env) pipe(extractArgs, mergeArgs []string) (from, to result) {
	e.t.Helper()
	x := e.command(append([]string{"extract"}, extractArgs...)...)
	m := e.command(append([]string{"merge"}, mergeArgs...)...)
	r, w, err := os.Pipe()
	if err != nil {
		e.t.Fatal(err)
	}
	var xe, mo, me bytes.Buffer
	x.Stdout, x.Stderr, m.Stdin, m.Stdout, m.Stderr = w, &xe, r, &mo, &me
	if err := m.Start(); err != nil {
		e.t.Fatal(err)
	}
	r.Close()
	_ = x.Run()
	w.Close()
	_ = m.Wait()
	return result{x.ProcessState.ExitCode(), "", xe.String()}, result{m.ProcessState.ExitCode(), mo.String(), me.String()}
}

func (e *env) mustPipe(extractArgs, mergeArgs []string) (sent extract.Result, position string) {
	e.t.Helper()
	from, to := e.pipe(append([]string{"--json"}, extractArgs...), mergeArgs)
	if from.code != 0 || to.code != 0 {
		e.t.Fatalf("extract: %d %s\nmerge: %d %s%s", from.code, from.stderr, to.code, to.stdout, to.stderr)
	}
	_, position, _ = strings.Cut(strings.TrimSpace(to.stdout), "position ")
	return sentOf(e.t, from.stderr), position
}

func sentOf(t testing.TB, out string) (r extract.Result) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil || r.MessageType != "summary" {
		t.Fatalf("the last line is no summary: %q: %v", lines[len(lines)-1], err)
	}
	return r
}

// sync runs sync, which must work.
func (e *env) sync(args ...string) extract.Result {
	e.t.Helper()
	return sentOf(e.t, e.must(append([]string{"sync", "--json"}, args...)...))
}

// oneLine fails the test unless a command failed with one clear line that holds
// all of want.
func oneLine(t testing.TB, r result, want ...string) {
	t.Helper()
	line := strings.TrimSpace(r.stderr)
	if r.code != 1 || strings.Contains(line, "\n") || r.stdout != "" {
		t.Fatalf("exit code %d, %q on stdout, on stderr:\n%s", r.code, r.stdout, line)
	}
	for _, w := range want {
		if !strings.Contains(line, w) {
			t.Fatalf("%q does not say %q", line, w)
		}
	}
}

// sameAs fails the test unless a target holds what the disk does.
func (d *disk) sameAs(target string) {
	d.t.Helper()
	run(d.t, "sync", "-f", d.file)
	same(d.t, d.file, target)
}

func streamEnv(t testing.TB) *env { return newEnv(t, filepath.Join(t.TempDir(), "none")) }

func TestExtractMergeRounds(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d, to := newDisk(t, streamSize), newDisk(t, streamSize+1<<20)
	d.scribble(r, 300)
	d.track(e)
	var last string
	for round := range count(60, 12) {
		dirty := int64(0)
		if round > 0 {
			dirty = d.scribble(r, r.IntN(60))
		}
		sent, position := e.mustPipe([]string{d.path}, []string{to.path})
		run(t, "cmp", "-n", fmt.Sprint(streamSize), d.path, to.path)
		if round == 0 {
			if sent.Changes != "full" {
				t.Fatalf("the first was %s", sent.Changes)
			}
		} else {
			if sent.Changes != "tracker" || sent.FallbackReason != "" {
				t.Fatalf("round %d: %s, %s", round, sent.Changes, sent.FallbackReason)
			}
			if last != "" && sent.From.String() != last {
				t.Fatalf("it goes on from %v, and %s was acknowledged", sent.From, last)
			}
		}
		// Without an acknowledgement the next stream holds all of this one.
		if round == 0 || r.IntN(3) > 0 {
			if last != "" && sent.DirtyBytes > dirty*4096 && sent.From.String() == position {
				t.Fatalf("%d bytes for %d dirty blocks", sent.DirtyBytes, dirty)
			}
			e.must("extract", "--commit", position, d.path)
			last = position
		}
		if got := strings.TrimSpace(e.must("merge", "--position", to.path)); got != position {
			t.Fatalf("the target is at %s and said %s", got, position)
		}
	}
}

func TestStreamByTheOtherNames(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d := newDisk(t, streamSize)
	d.scribble(r, 50)
	dir, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	for _, name := range []string{"dmextract", "dmmerge"} {
		if err := os.Symlink(dsync, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := e.prepare("sh", "-c", "dmextract "+d.path+" | dmmerge "+image)
	cmd.Env = append(cmd.Env, "PATH="+dir+":"+os.Getenv("PATH"))
	if r := finish(t, cmd); r.code != 0 {
		t.Fatal(r.stderr)
	}
	d.sameAs(image)
}

// sshd runs a server of ssh on the loopback interface, and gives the command
// that reaches it.
func sshd(t testing.TB) (command, target string) {
	t.Helper()
	dir := t.TempDir()
	for _, key := range []string{"host", "user"} {
		run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key))
	}
	public, err := os.ReadFile(filepath.Join(dir, "user.pub"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "authorized"), public, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		t.Fatal(err)
	}
	port := 20000 + rand.IntN(20000)
	server := exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", filepath.Join(dir, "host"), "-p", fmt.Sprint(port),
		"-o", "ListenAddress=127.0.0.1", "-o", "AuthorizedKeysFile="+filepath.Join(dir, "authorized"), "-o", "StrictModes=no",
		"-o", "PidFile=none", "-o", "UsePAM=no", "-o", "PermitRootLogin=yes")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = server.Process.Kill(), server.Wait() })
	command = "ssh -q -F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -i " + filepath.Join(dir, "user")
	for range 100 {
		if exec.Command("sh", "-c", command+fmt.Sprintf(" -p %d 127.0.0.1 true", port)).Run() == nil {
			return command, fmt.Sprintf("ssh://127.0.0.1:%d", port)
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("sshd does not answer")
	return "", ""
}

func TestSyncOverSSH(t *testing.T) {
	e, r := streamEnv(t), random(t)
	command, at := sshd(t)
	d, remote := newDisk(t, streamSize), t.TempDir()
	d.scribble(r, 200)
	d.track(e)
	image := filepath.Join(remote, "it's here.img")
	args := []string{d.path, at + image, "--ssh-command", command, "--remote-command", dsync, "--remote-state-dir", filepath.Join(remote, "state")}
	for round := range count(20, 4) {
		sent := e.sync(args...)
		if want := map[bool]string{true: "full", false: "tracker"}[round == 0]; string(sent.Changes) != want {
			t.Fatalf("round %d: %s, not %s", round, sent.Changes, want)
		}
		d.sameAs(image)
		d.scribble(r, 20)
	}
	if got := e.sync(append(args, "--changes", "compare")...); got.Changes != "compare" {
		t.Fatalf("changes: %s", got.Changes)
	}
	d.sameAs(image)
	// What the other end says arrives.
	args[1] = at + "/dev/there-is-no-such-device"
	oneLine(t, e.try(append([]string{"sync"}, args...)...), "there is no device")
}

func TestSyncToTwoTargets(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d := newDisk(t, streamSize)
	d.scribble(r, 100)
	d.track(e)
	dir := t.TempDir()
	targets := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b"), newDisk(t, streamSize).path}
	for _, target := range targets {
		e.sync(d.path, target)
	}
	for range count(40, 10) {
		d.scribble(r, 10)
		i := r.IntN(len(targets))
		if sent := e.sync(d.path, targets[i]); sent.Changes != "tracker" {
			t.Fatalf("%s: %s", targets[i], sent.Changes)
		}
		d.sameAs(targets[i])
	}
	// Each has its place in the log.
	holders, _ := filepath.Glob(filepath.Join(e.stateDir(), "trackers", "*", "holders", "*.json"))
	if len(holders) != len(targets) {
		t.Fatalf("%d holders for %d targets", len(holders), len(targets))
	}
	// Tracking that begins anew is said, and compared.
	e.must("track", "stop", d.path)
	d.scribble(r, 10)
	e.must("track", "start", d.path)
	sent := e.sync(d.path, targets[0])
	if sent.Changes != "compare" || !strings.Contains(sent.FallbackReason, "history") {
		t.Fatalf("%s: %q", sent.Changes, sent.FallbackReason)
	}
	d.sameAs(targets[0])
	oneLine(t, e.try("sync", "--changes", "tracker", d.path, targets[1]), "another history", "--changes compare")
	if e.sync(d.path, targets[0]).Changes != "tracker" {
		t.Fatal("not followed after the comparison")
	}
}

func (e *env) stateDir() string {
	for _, v := range e.vars {
		if dir, ok := strings.CutPrefix(v, "DSYNC_STATE_DIR="); ok {
			return dir
		}
	}
	e.t.Fatal("no state directory")
	return ""
}

func TestSyncOfAMountedDevice(t *testing.T) {
	e, r := streamEnv(t), random(t)
	d := newDisk(t, 256<<20)
	d.mkfs("ext4")
	d.track(e)
	image := filepath.Join(t.TempDir(), "image")
	oneLine(t, e.try("sync", d.path, filepath.Join(d.mnt, "image")), "lies on")
	for _, way := range []string{"precopy", "freeze", "auto", "none"} {
		w := d.busyWriter(r.Uint64())
		sent := e.sync("--snapshot", way, d.path, image)
		w.end()
		switch way {
		case "none":
			continue
		case "precopy", "auto":
			if sent.Rounds < 2 || sent.FreezeSeconds == 0 {
				t.Fatalf("%s: %d rounds, frozen for %v s", way, sent.Rounds, sent.FreezeSeconds)
			}
		}
		// The journal of a frozen file system is empty: it is whole as it is.
		run(t, "e2fsck", "-fn", image)
	}
	d.umount()
	e.sync(d.path, image)
	d.sameAs(image)
}
