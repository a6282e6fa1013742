// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
)

const testBlocks = 2048

// envTracker is the kind of tracker that the tests use; default: bpf.
const envTracker = "DSYNC_TEST_TRACKER"

// disk is a tracked loop device.
type disk struct {
	device  string // as it is to be used
	tracker trackers.Tracker
	file    *os.File
}

func newDisk(t *testing.T) *disk {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, testBlocks*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
	kind := trackers.Kind(os.Getenv(envTracker))
	if kind == "" {
		kind = trackers.BPF
	}
	loop := run(t, "losetup", "--find", "--show", image)
	t.Cleanup(func() { run(t, "losetup", "-d", loop) })
	var err error
	d := &disk{}
	if d.tracker, err = trackers.Start(t.Context(), loop, trackers.Options{Kind: kind}); err != nil {
		t.Fatal(err)
	}
	d.device = d.tracker.Device()
	t.Cleanup(func() {
		if err := d.tracker.Stop(context.Background()); err != nil && !errors.Is(err, kernel.ErrNotTracked) {
			t.Error(err)
		}
		_ = os.Remove(filepath.Join(lockDir, d.tracker.UUID().String()+".lock"))
	})
	if d.file, err = os.OpenFile(d.device, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.file.Close() })
	return d
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// write leaves blocks dirty in the device's page cache: a rotation syncs it.
func (d *disk) write(t *testing.T, blocks ...int64) {
	t.Helper()
	for _, b := range blocks {
		if _, err := d.file.WriteAt([]byte("new"), b*kernel.BlockSize); err != nil {
			t.Fatal(err)
		}
	}
}

func (d *disk) open(t *testing.T, stateDir string) *Session {
	t.Helper()
	s, err := Open(t.Context(), d.tracker, stateDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Unlock() })
	return s
}

func rotate(t *testing.T, s *Session) kernel.Position {
	t.Helper()
	e, err := s.Rotate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return e.Position
}

// backup is one turn: write, rotate, commit, unlock.
func (d *disk) backup(t *testing.T, stateDir string, blocks ...int64) kernel.Position {
	t.Helper()
	d.write(t, blocks...)
	s := d.open(t, stateDir)
	p := rotate(t, s)
	if err := errors.Join(s.Commit(t.Context()), s.Unlock()); err != nil {
		t.Fatal(err)
	}
	return p
}

func wantSince(t *testing.T, s *Session, pos kernel.Position, blocks ...int64) {
	t.Helper()
	b, err := s.Since(t.Context(), pos)
	if err != nil {
		t.Fatal(err)
	}
	want := kernel.NewBitmap(testBlocks)
	for _, i := range blocks {
		want.Set(i)
	}
	if !b.Equal(want) {
		t.Fatalf("since %s: %v, want %v", pos, b.Extents(testBlocks*kernel.BlockSize), want.Extents(testBlocks*kernel.BlockSize))
	}
}

func wantBroken(t *testing.T, s *Session, pos kernel.Position, reason string) {
	t.Helper()
	_, err := s.Since(t.Context(), pos)
	if !errors.Is(err, ErrBroken) || !strings.Contains(err.Error(), reason) || strings.Contains(err.Error(), "\n") {
		t.Fatalf("since %s: %v; want one line with %q", pos, err, reason)
	}
}

func TestSinceUnitesTheEpochsAfterAPosition(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	first := d.backup(t, dir, 1)
	second := d.backup(t, dir, 2, 3)
	d.backup(t, dir)
	d.write(t, 4, 1)
	s := d.open(t, dir)
	wantSince(t, s, first, 2, 3) // without a rotation: what has ended
	last := rotate(t, s)
	// Rotated, not committed: the repositories at either position, and this one.
	wantSince(t, s, first, 1, 2, 3, 4)
	wantSince(t, s, second, 1, 4)
	wantSince(t, s, last)
	if err := s.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantSince(t, s, first, 1, 2, 3, 4)
	wantSince(t, s, last)
}

func TestSinceEndsWithTheSessionsOwnRotation(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	first := d.backup(t, dir)
	d.write(t, 1)
	s := d.open(t, dir)
	rotate(t, s)
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	d.backup(t, dir, 2) // by another process meanwhile
	wantSince(t, s, first, 1)
}

func TestSinceNeverGuesses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil  func(t *testing.T, d *disk, dir string, p *kernel.Position)
		reason string
	}{
		"OtherTracker": {func(_ *testing.T, _ *disk, _ string, p *kernel.Position) { p.Tracker = kernel.NewUUID() }, "another history"},
		"ZeroPosition": {func(_ *testing.T, _ *disk, _ string, p *kernel.Position) { *p = kernel.Position{} }, "another history"},
		"OtherNonce":   {func(_ *testing.T, _ *disk, _ string, p *kernel.Position) { p.Nonce = kernel.NewNonce() }, "reverted"},
		"Future":       {func(_ *testing.T, _ *disk, _ string, p *kernel.Position) { p.Epoch = 99 }, "reverted"},
		"StartMissing": {func(t *testing.T, d *disk, dir string, _ *kernel.Position) {
			remove(t, logOf(dir, d.tracker.UUID()).path(1))
		}, "epoch 1 is not in the log"},
		"Gap": {func(t *testing.T, d *disk, dir string, _ *kernel.Position) {
			remove(t, logOf(dir, d.tracker.UUID()).path(2))
		}, "epoch 2 is not in the log"},
		"Damaged": {func(t *testing.T, d *disk, dir string, _ *kernel.Position) {
			if err := os.Truncate(logOf(dir, d.tracker.UUID()).path(2), 100); err != nil {
				t.Fatal(err)
			}
		}, "truncated"},
		"Swapped": {func(t *testing.T, d *disk, dir string, _ *kernel.Position) {
			l := logOf(dir, d.tracker.UUID())
			if err := os.Rename(l.path(3), l.path(2)); err != nil {
				t.Fatal(err)
			}
		}, "it holds epoch 3"},
		"SizeChanged": {func(t *testing.T, d *disk, dir string, p *kernel.Position) {
			l := logOf(dir, d.tracker.UUID())
			e := kernel.Epoch{Position: kernel.Position{Tracker: p.Tracker, Epoch: 2}, Bitmap: kernel.NewBitmap(testBlocks + 1)}
			if err := os.WriteFile(l.path(2), Encode(e), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "shrank"},
		"ForeignEntry": {func(t *testing.T, d *disk, dir string, _ *kernel.Position) {
			l := logOf(dir, d.tracker.UUID())
			e := kernel.Epoch{Position: kernel.Position{Tracker: kernel.NewUUID(), Epoch: 2}, Bitmap: kernel.NewBitmap(testBlocks)}
			if err := os.WriteFile(l.path(2), Encode(e), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "holds an epoch of the tracker"},
		"Unreliable": {func(t *testing.T, d *disk, _ string, _ *kernel.Position) {
			if err := d.tracker.Invalidate(t.Context(), "it was told so"); err != nil {
				t.Fatal(err)
			}
		}, "it was told so"},
		"Stopped": {func(t *testing.T, d *disk, _ string, _ *kernel.Position) {
			other, err := trackers.Open(d.device)
			if err != nil {
				t.Fatal(err)
			}
			_ = d.file.Close() // a mapped device that is in use cannot go
			if err := other.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
		}, "tracking was stopped"},
	} {
		t.Run(name, func(t *testing.T) {
			d, dir := newDisk(t), t.TempDir()
			p := d.backup(t, dir, 1)
			d.backup(t, dir, 2)
			d.backup(t, dir, 3)
			s := d.open(t, dir)
			wantSince(t, s, p, 2, 3)
			c.spoil(t, d, dir, &p)
			wantBroken(t, s, p, c.reason)
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func TestLockExcludesAndWaits(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	s := d.open(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, d.tracker, t.TempDir()); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("opened while locked: %v", err)
	}
	opened := make(chan error, 1)
	go func() {
		other, err := Open(t.Context(), d.tracker, dir)
		if err == nil {
			err = other.Unlock()
		}
		opened <- err
	}()
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rotate(t.Context()); err == nil {
		t.Fatal("rotated without the lock")
	}
}

func TestSecondRotationNeedsACommit(t *testing.T) {
	d := newDisk(t)
	s := d.open(t, t.TempDir())
	rotate(t, s)
	if _, err := s.Rotate(t.Context()); !errors.Is(err, kernel.ErrUnacknowledged) {
		t.Fatalf("rotated twice: %v", err)
	}
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context()); err == nil {
		t.Fatal("committed without the lock")
	}
}

func TestCommitOfWhatAnotherProcessLogged(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	first := d.backup(t, dir)
	s := d.open(t, dir)
	d.write(t, 1)
	mine := rotate(t, s)
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	other := d.backup(t, dir, 2) // logs and acknowledges mine first
	if err := errors.Join(s.Relock(t.Context()), s.Commit(t.Context()), s.Commit(t.Context())); err != nil {
		t.Fatal(err)
	}
	if other.Epoch != mine.Epoch+1 {
		t.Fatalf("the other rotated epoch %d, want %d", other.Epoch, mine.Epoch+1)
	}
	wantSince(t, s, first, 1)
	wantSince(t, d.relockedBy(t, s, dir), mine, 2)
}

// relockedBy hands the lock to a new session.
func (d *disk) relockedBy(t *testing.T, s *Session, dir string) *Session {
	t.Helper()
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	return d.open(t, dir)
}

func TestCommitOverAnotherNonceIsAnError(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	s := d.open(t, dir)
	p := rotate(t, s)
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	d.backup(t, dir)
	p.Nonce = kernel.NewNonce()
	e := kernel.Epoch{Position: p, Bitmap: kernel.NewBitmap(testBlocks)}
	if err := os.WriteFile(logOf(dir, p.Tracker).path(p.Epoch), Encode(e), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Relock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context()); err == nil || !strings.Contains(err.Error(), "instead of") {
		t.Fatalf("committed over another epoch: %v", err)
	}
}

// TestKernelReplacesAFutureThatNeverWas finds an entry of the same epoch with
// another nonce, as after a machine was reverted: the kernel's epoch replaces
// it, and the position of the other one is broken.
func TestKernelReplacesAFutureThatNeverWas(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	first := d.backup(t, dir)
	never := first
	never.Epoch, never.Nonce = 2, kernel.NewNonce()
	e := kernel.Epoch{Position: never, Bitmap: kernel.NewBitmap(testBlocks)}
	if err := os.WriteFile(logOf(dir, never.Tracker).path(2), Encode(e), 0o600); err != nil {
		t.Fatal(err)
	}
	d.backup(t, dir, 5)
	s := d.open(t, dir)
	wantSince(t, s, first, 5)
	wantBroken(t, s, never, "reverted")
	if err := s.Reverted(t.Context(), never); !errors.Is(err, ErrReverted) {
		t.Errorf("another nonce: %v", err)
	}
	future := kernel.Position{Tracker: first.Tracker, Epoch: 3, Nonce: first.Nonce}
	if err := s.Reverted(t.Context(), future); !errors.Is(err, ErrReverted) {
		t.Errorf("an epoch that has not ended: %v", err)
	}
	// What is no longer in the log, and what is another tracker's, proves nothing.
	foreign := future
	foreign.Tracker = kernel.NewUUID()
	remove(t, logOf(dir, first.Tracker).path(1))
	for _, p := range []kernel.Position{first, foreign} {
		if err := s.Reverted(t.Context(), p); err != nil {
			t.Error(err)
		}
	}
}

// TestRotateWritesNothing rotates with the state directory on a frozen file
// system.
func TestRotateWritesNothing(t *testing.T) {
	d, dir := newDisk(t), t.TempDir()
	image := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", image)
	run(t, "mount", "-o", "loop", image, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	first := d.backup(t, dir)
	d.write(t, 9)
	s := d.open(t, dir)
	run(t, "fsfreeze", "-f", dir)
	t.Cleanup(func() { _ = exec.Command("fsfreeze", "-u", dir).Run() })
	rotate(t, s)
	wantSince(t, s, first, 9)
	run(t, "fsfreeze", "-u", dir)
	if err := s.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantSince(t, s, first, 9)
}
