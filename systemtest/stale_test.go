// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// readCached reads all of a device through the page cache, as dd does.
func readCached(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestBackupDoesNotSeeWhatThePageCacheRemembers sets the trap and shows that
// it is one: pages of the device, read through the page cache, are not changed
// by what the file system writes to the same blocks.
func TestBackupDoesNotSeeWhatThePageCacheRemembers(t *testing.T) {
	r := random(t)
	c := newContent(r, false)
	d := newDisk(t, 128<<20)
	e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
	e.initLight()
	d.mkfs("ext4")
	d.track(e)
	files := []string{filepath.Join(d.mnt, "a"), filepath.Join(d.mnt, "b")}
	for _, f := range files {
		fillFile(t, f, c, 12<<20)
	}
	for i, want := range []snapshot.Changes{snapshot.ChangesFull, snapshot.ChangesTracker} {
		cached := readCached(t, d.path)
		overwrite(t, files[i], c)
		truth := filepath.Join(t.TempDir(), "truth")
		sum := d.backupFrozen(e, truth)
		if sum.Changes != want {
			t.Fatalf("changes %s, want %s: %s", sum.Changes, want, sum.FallbackReason)
		}
		if n := differing(t, readCached(t, d.path), truth); n < 8<<20 {
			t.Fatalf("the page cache holds only %d stale bytes: this test would not notice who reads them", n)
		}
		if bytes.Equal(cached, readAll(t, truth)) {
			t.Fatal("the file system wrote nothing")
		}
		e.restoresTo(sum.SnapshotID.String(), truth)
		e.dumpsAs(sum.SnapshotID.String(), truth)
		e.check()
	}
}

// overwrite changes a file's content in place and has it written to the disk.
func overwrite(t testing.TB, path string, c *content) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 12<<20)
	c.fill(b)
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func readAll(t testing.TB, path string) []byte {
	t.Helper()
	f := open(t, path)
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// differing counts the bytes of blocks that are not what truth holds.
func differing(t testing.TB, b []byte, truth string) (n int) {
	t.Helper()
	want := readAll(t, truth)
	if len(b) != len(want) {
		t.Fatalf("%d bytes, want %d", len(b), len(want))
	}
	for i := 0; i < len(b); i += kernel.BlockSize {
		if !bytes.Equal(b[i:i+kernel.BlockSize], want[i:i+kernel.BlockSize]) {
			n += kernel.BlockSize
		}
	}
	return n
}

// TestBackupHasWhatOnlyThePageCacheHolds writes to the device through the page
// cache, and backs it up while nothing of that need have reached the disk: the
// backup has it, and so have the tracker's bits in the next one.
func TestBackupHasWhatOnlyThePageCacheHolds(t *testing.T) {
	r := random(t)
	c := newContent(r, false)
	d := newDisk(t, 64<<20)
	e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
	e.initLight()
	d.track(e)
	// It stays open: its last user's close writes the pages out.
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := make([]byte, 64<<20)
	for i, changes := range []snapshot.Changes{snapshot.ChangesFull, snapshot.ChangesTracker, snapshot.ChangesTracker, snapshot.ChangesTracker} {
		var dirty int64
		for _, n := range someBlocks(r, int64(len(want)), 200) {
			off := n * kernel.BlockSize
			b := want[off : off+kernel.BlockSize]
			c.fill(b)
			if _, err := f.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
			dirty += kernel.BlockSize
		}
		sum := e.backup(d.path)
		if sum.Changes != changes || sum.PointInTime != string(snapshot.PointInTimeUnmounted) {
			t.Fatalf("backup %d: changes %s, want %s; point in time %s; reason %q", i, sum.Changes, changes, sum.PointInTime, sum.FallbackReason)
		}
		if i > 0 && (sum.DirtyBytes < dirty || sum.DirtyBytes > 2*dirty) {
			t.Fatalf("backup %d: %d bytes are dirty, %d were written", i, sum.DirtyBytes, dirty)
		}
		truth := filepath.Join(t.TempDir(), "truth")
		if err := os.WriteFile(truth, want, 0o600); err != nil {
			t.Fatal(err)
		}
		e.restoresTo(sum.SnapshotID.String(), truth)
		if n := differing(t, readAll(t, d.file), truth); n != 0 {
			t.Fatalf("backup %d: %d bytes of the device are not on its disk after the backup", i, n)
		}
	}
	e.check()
}
