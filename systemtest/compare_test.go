// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// TestACompareStoresOnlyWhatChangedHoweverWornTheChainIs overwrites a device at random
// for many backups, then changes 1 % of it while nothing tracks it. The next backup
// reads the device once, and adds what changed.
func TestACompareStoresOnlyWhatChangedHoweverWornTheChainIs(t *testing.T) {
	const size = 64 << 20
	rng := random(t)
	e, d := lightEnv(t), newDisk(t, size)
	d.track(e)
	f := direct(t, d.path)
	c := newContent(rng, true)
	fillRange(t, f, c, 0, size)
	e.backup(d.path)
	for range count(200, 20) {
		writeBlocks(t, f, c, someBlocks(rng, size, size/kernel.BlockSize/50))
		e.backup(d.path)
	}
	e.must("track", "stop", d.path)
	const changed = size / kernel.BlockSize / 100
	writeBlocks(t, f, c, someBlocks(rng, size, changed))
	s := e.backup(d.path)
	if s.Changes != snapshot.ChangesCompare || s.FallbackReason == "" {
		t.Fatalf("%+v", s)
	}
	if s.BytesRead != size {
		t.Errorf("read %d bytes of %d", s.BytesRead, size)
	}
	// What is copied forward, to free worn blobs, is apart, and at most a quarter.
	const dirty = changed * kernel.BlockSize
	if s.DirtyBytes != dirty || s.DataAdded > dirty*11/10 || s.CopiedForwardBytes > dirty/4 {
		t.Errorf("%d bytes changed: dirty %d, added %d, copied forward %d", dirty, s.DirtyBytes, s.DataAdded, s.CopiedForwardBytes)
	}
	e.sameAtRest(d)
	e.restic("0.18", "check", "--read-data")
}

// TestAnImageFileNeedsNoRoot backs up, compares, restores and verifies an image file as
// a user who is nobody.
func TestAnImageFileNeedsNoRoot(t *testing.T) {
	const size = 16 << 20
	rng := random(t)
	dir, err := os.MkdirTemp("", "nobody")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program := filepath.Join(dir, "dsync-backup")
	run(t, "cp", dsync, program)
	file := filepath.Join(dir, "disk.img")
	run(t, "truncate", "-s", "16M", file)
	run(t, "chown", "-R", "nobody", dir)
	e := newEnv(t, filepath.Join(dir, "repo"), "DSYNC_STATE_DIR="+filepath.Join(dir, "state"), "DSYNC_CACHE_DIR="+filepath.Join(dir, "cache"), "HOME="+dir)
	as := func(args ...string) string {
		t.Helper()
		cmd := e.prepare(program, args...)
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		r := finish(t, cmd)
		if r.code != 0 {
			t.Fatalf("%v: %+v", args, r)
		}
		return r.stdout
	}
	as("init")
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	c := newContent(rng, true)
	for i, want := range []snapshot.Changes{snapshot.ChangesFull, snapshot.ChangesCompare, snapshot.ChangesCompare} {
		b := make([]byte, 40*kernel.BlockSize)
		c.fill(b)
		if _, err := f.WriteAt(b, rng.Int64N(size/kernel.BlockSize-40)*kernel.BlockSize); err != nil {
			t.Fatal(err)
		}
		s := summary(t, as("backup", "--json", file))
		if s.Changes != want || s.FallbackReason != "" || i > 0 && s.DirtyBytes > int64(len(b)) {
			t.Errorf("%+v", s)
		}
	}
	as("verify", "latest", file)
	as("restore", "latest", filepath.Join(dir, "restored"))
	same(t, file, filepath.Join(dir, "restored"))
	if out, err := exec.Command("stat", "-c", "%U", filepath.Join(dir, "repo/config")).Output(); err != nil || string(out) != "nobody\n" {
		t.Errorf("the repository is %s's: %v", out, err)
	}
}
