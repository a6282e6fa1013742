// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// initLight makes a repository whose key is cheap to open.
func (e *env) initLight() {
	e.t.Helper()
	ctx := context.Background()
	be, err := location.Open(ctx, e.repo, location.Options{})
	if err != nil {
		e.t.Fatal(err)
	}
	defer be.Close()
	r, err := repo.Init(ctx, be, "geheim", repo.Options{KDF: crypto.Params{N: 1024, R: 8, P: 1}})
	if err != nil {
		e.t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		e.t.Fatal(err)
	}
}

// image copies what the device's file holds, holes left out. Of a device that
// nobody holds open, that is what the device holds.
func (d *disk) image(to string) {
	d.t.Helper()
	run(d.t, "cp", "--sparse=always", d.file, to)
}

// ext4NeedsRecovery is where an ext4 superblock says that its journal is in
// use: a mounted file system clears the bit in the last write of a freeze, and
// sets it in the first of a thaw (fs/ext4/super.c, ext4_freeze).
const (
	ext4Incompatible  = 1024 + 0x60
	ext4NeedsRecovery = 0x04
)

// frozen looks on the disk whether the mounted ext4 file system is frozen,
// without touching the file system.
func frozen(t testing.TB, image io.ReaderAt) bool {
	t.Helper()
	var b [1]byte
	if _, err := image.ReadAt(b[:], ext4Incompatible); err != nil {
		t.Fatal(err)
	}
	return b[0]&ext4NeedsRecovery == 0
}

// backupFrozen backs up a mounted ext4 file system with --snapshot freeze,
// whoever writes to it, and copies what the device holds during the freeze to
// the file truth: it stops the backup's process once it sees the freeze. A
// freeze that was over before it was seen leaves a snapshot that nothing can
// be compared with: that one is forgotten, and another made.
func (d *disk) backupFrozen(e *env, truth string, args ...string) snapshot.Summary {
	d.t.Helper()
	return d.backupCaught(e, snapshot.PointInTimeFreeze, truth, args)
}

// backupPrecopied is the same with --snapshot precopy.
func (d *disk) backupPrecopied(e *env, truth string, args ...string) snapshot.Summary {
	d.t.Helper()
	return d.backupCaught(e, snapshot.PointInTimePrecopy, truth, args)
}

func (d *disk) backupCaught(e *env, way snapshot.PointInTime, truth string, args []string) snapshot.Summary {
	d.t.Helper()
	args = append([]string{"--snapshot", string(way)}, args...)
	for range 20 {
		s, seen := d.catchFreeze(e, truth, args)
		if s.PointInTime != string(way) || s.FreezeSeconds <= 0 {
			d.t.Fatalf("snapshot %s says it is a point in time by %q, frozen for %v s", s.SnapshotID.Str(), s.PointInTime, s.FreezeSeconds)
		}
		if seen {
			return s
		}
		d.t.Logf("the freeze of snapshot %s went by unseen", s.SnapshotID.Str())
		e.restic("0.18", "forget", s.SnapshotID.String())
	}
	d.t.Fatal("no freeze lasted long enough to be seen")
	return snapshot.Summary{}
}

func (d *disk) catchFreeze(e *env, truth string, args []string) (s snapshot.Summary, seen bool) {
	d.t.Helper()
	image, err := os.Open(d.file)
	if err != nil {
		d.t.Fatal(err)
	}
	defer image.Close()
	if frozen(d.t, image) {
		d.t.Fatalf("%s is not in use by a mounted ext4 file system, or frozen already", d.path)
	}
	cmd := e.command(append([]string{"backup", "--json", "--max-freeze", "5m", d.path}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for {
		select {
		case err := <-exited:
			if err != nil {
				d.t.Fatalf("backup of %s: %v\n%s%s", d.path, err, out.String(), errs.String())
			}
			return summary(d.t, out.String()), seen
		case <-time.After(200 * time.Microsecond):
		}
		if !seen && frozen(d.t, image) {
			seen = d.copyStopped(cmd, image, truth)
		}
	}
}

// copyStopped copies the frozen device while the backup stands still, and
// reports whether it was frozen all the while.
func (d *disk) copyStopped(cmd *exec.Cmd, image io.ReaderAt, truth string) bool {
	d.t.Helper()
	_ = cmd.Process.Signal(syscall.SIGSTOP) // it may have ended
	defer func() { _ = cmd.Process.Signal(syscall.SIGCONT) }()
	if !frozen(d.t, image) {
		return false
	}
	d.image(truth)
	return frozen(d.t, image)
}

// tracked is what the device's tracker says of itself.
func (e *env) tracked(d *disk) kernel.Status {
	e.t.Helper()
	var list []kernel.Status
	if err := json.Unmarshal([]byte(e.must("track", "status", "--json", d.path)), &list); err != nil || len(list) != 1 {
		e.t.Fatalf("track status: %v, %d trackers", err, len(list))
	}
	return list[0]
}

// restoresTo restores a snapshot to a new file, and fails the test if that is
// not what truth holds.
func (e *env) restoresTo(id, truth string) {
	e.t.Helper()
	to := filepath.Join(e.t.TempDir(), "restored")
	e.must("restore", "--json", id, to)
	sameSparse(e.t, truth, to)
	if err := os.Remove(to); err != nil {
		e.t.Fatal(err)
	}
}

// dumpsAs dumps a snapshot and fails the test if that is not what truth holds.
func (e *env) dumpsAs(id, truth string) {
	e.t.Helper()
	cmd := e.command("dump", id)
	compare := exec.Command("cmp", "-", truth)
	var errs, difference bytes.Buffer
	cmd.Stderr, compare.Stdout, compare.Stderr = &errs, &difference, &difference
	out, err := cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	compare.Stdin = out
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	differs := compare.Run()
	if err := errors.Join(cmd.Wait(), differs); err != nil {
		e.t.Fatalf("dump %s and compare it with %s: %v\n%s%s", id, truth, err, errs.String(), difference.String())
	}
}

// restoresOver restores a snapshot over what another device holds.
func (e *env) restoresOver(id, truth string, target *disk) {
	e.t.Helper()
	e.must("restore", "--json", "--force", id, target.path)
	sameSparse(e.t, truth, target.file)
}
