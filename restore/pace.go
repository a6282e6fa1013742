// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// paceWindow is how much of a file is written, and not on the disk yet.
const paceWindow = 64 << 20

// pace writes to a file through the page cache, and leaves nothing there: the kernel is
// told to write at once, and to forget what is written. Thus the disk has the whole window to
// write, and whoever fetches blobs does not wait for it: measured, direct writes to a file,
// also to space that was allocated before, took half as long again.
type pace struct {
	file *os.File

	mu      sync.Mutex
	written []kernel.Extent // oldest first
	bytes   int64           // of written
}

// write writes p. That an earlier write did not reach the disk is told by a later one, or by
// the file's sync.
func (w *pace) write(p []byte, off int64) error {
	if _, err := w.file.WriteAt(p, off); err != nil {
		return err
	}
	e := kernel.Extent{Offset: off, Length: int64(len(p))}
	if err := w.advise(e, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		return err
	}
	for _, e := range w.add(e) {
		if err := w.advise(e, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER); err != nil {
			return err
		}
		_ = unix.Fadvise(int(w.file.Fd()), e.Offset, e.Length, unix.FADV_DONTNEED)
	}
	return nil
}

// advise tells the kernel to write a range, or to wait for it. Its error must not be lost: a
// wait that tells that a write failed has told it for this descriptor, and the sync at the end
// then says that all is well (file_fdatawait_range, mm/filemap.c). Where a file system does not
// know the call, it has told nothing, and the sync writes.
func (w *pace) advise(e kernel.Extent, flags int) error {
	err := unix.SyncFileRange(int(w.file.Fd()), e.Offset, e.Length, flags)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINTR):
		return nil
	case err != nil:
		return fmt.Errorf("an earlier write did not reach the disk: %w", err)
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
