// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestAWriteThatFailedBehindTheWindowIsTold has a disk fail for the first of what is
// written, and work again before the window has passed it: the error may come from a
// later write or from the sync, and must come.
func TestAWriteThatFailedBehindTheWindowIsTold(t *testing.T) {
	f := newFixture(t, seed(t), 0)
	memory := f.tmpfs("12m")
	disk := filepath.Join(memory, "disk")
	f.must(os.WriteFile(disk, nil, 0o600))
	f.must(os.Truncate(disk, 4*paceWindow))
	path := filepath.Join(f.ext4(f.bind(disk)), "image")
	f.must(os.WriteFile(path, nil, 0o600))
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	f.must(err)
	defer file.Close()
	watcher, err := os.OpenFile(path, os.O_RDWR, 0)
	f.must(err)
	defer watcher.Close()

	piece := make([]byte, 1<<20)
	f.fill(piece)
	w := &pace{file: file}
	var told error
	write := func(from, to int64) {
		for off := from; off < to && told == nil; off += int64(len(piece)) {
			told = w.write(piece, off)
		}
	}
	write(0, paceWindow/2)
	if err := watcher.Sync(); err == nil {
		t.Fatal("the disk did not fail")
	}
	if out, err := exec.Command("mount", "-o", "remount,size=400m", memory).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	write(paceWindow/2, 3*paceWindow)
	if told == nil {
		told = file.Sync()
	}
	if told == nil {
		t.Error("a write was lost, and nobody was told")
	}
	t.Log(told)
}
