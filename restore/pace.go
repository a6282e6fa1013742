// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// paceWindow is how much of a file is written, and not on the disk yet.
const paceWindow = 64 << 20

// pace writes to a file through the page cache, and leaves nothing there: the kernel is
// told to write at once, and to forget what is written. A file system allocates the space
// of a file one direct write at a time, so that the disk has one to do, where here it has
// the whole window; and whoever fetches blobs does not wait for it.
type pace struct {
	file *os.File

	mu      sync.Mutex
	written []kernel.Extent // oldest first
	bytes   int64           // of written
}

// write writes p. When it fails to reach the disk later, the file's sync says so.
func (w *pace) write(p []byte, off int64) error {
	if _, err := w.file.WriteAt(p, off); err != nil {
		return err
	}
	e := kernel.Extent{Offset: off, Length: int64(len(p))}
	// Advice: where it is not taken the data are written by the sync.
	_ = unix.SyncFileRange(int(w.file.Fd()), e.Offset, e.Length, unix.SYNC_FILE_RANGE_WRITE)
	for _, e := range w.add(e) {
		_ = unix.SyncFileRange(int(w.file.Fd()), e.Offset, e.Length,
			unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		_ = unix.Fadvise(int(w.file.Fd()), e.Offset, e.Length, unix.FADV_DONTNEED)
	}
	return nil
}

// add adds what was written, and takes out what lies further back than the window.
func (w *pace) add(e kernel.Extent) (old []kernel.Extent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.written, w.bytes = append(w.written, e), w.bytes+e.Length
	n := 0
	for ; w.bytes > paceWindow; n++ {
		w.bytes -= w.written[n].Length
	}
	old, w.written = w.written[:n:n], w.written[n:]
	return old
}

// drained has the page cache forget the rest, once it is durable.
func (w *pace) drained() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.written {
		_ = unix.Fadvise(int(w.file.Fd()), e.Offset, e.Length, unix.FADV_DONTNEED)
	}
	w.written, w.bytes = nil, 0
}
