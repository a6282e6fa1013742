// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

const (
	pageSize   = 4096
	maxRead    = 4 << 20 // per system call, so that a cancelled context is noticed
	bounceSize = 1 << 20
)

// ReadError says which bytes could not be read.
type ReadError struct {
	Path   string
	Extent kernel.Extent
	Err    error
}

func (e *ReadError) Error() string {
	return fmt.Sprintf("read %s, bytes %d to %d: %v", e.Path, e.Extent.Offset, e.Extent.End()-1, e.Err)
}

func (e *ReadError) Unwrap() error { return e.Err }

// AlignedBuffer returns n bytes of memory that start on a page, as direct
// reads want them.
func AlignedBuffer(n int) []byte {
	b := make([]byte, n+pageSize)
	skip := 0
	if r := int(uintptr(unsafe.Pointer(&b[0])) % pageSize); r != 0 {
		skip = pageSize - r
	}
	return b[skip : skip+n : skip+n]
}

// ReadExtent fills buf with the bytes of the device from off on, all of which
// must lie inside its size. Any offset, length and memory will do, but only
// aligned ones are read without a copy: a buffer from [AlignedBuffer] and an
// offset that is a multiple of kernel.BlockSize; a short last block costs a
// copy of that block. An error is a *ReadError; a device that ended early is
// ErrShrunk. It gives up between reads of 4 MiB when ctx is done.
func (d *Device) ReadExtent(ctx context.Context, buf []byte, off int64) error {
	if len(buf) == 0 {
		return nil
	}
	e := kernel.Extent{Offset: off, Length: int64(len(buf))}
	if err := e.Validate(d.size); err != nil {
		return &ReadError{d.path, e, err}
	}
	a := uintptr(d.align)
	if uintptr(unsafe.Pointer(&buf[0]))%a == 0 && off%int64(a) == 0 {
		whole := len(buf) / int(a) * int(a)
		if err := d.readFull(ctx, buf[:whole], off, whole); err != nil {
			return err
		}
		buf, off = buf[whole:], off+int64(whole)
	}
	return d.readBounced(ctx, buf, off)
}

// readBounced reads what is not aligned through an aligned buffer.
func (d *Device) readBounced(ctx context.Context, buf []byte, off int64) error {
	if len(buf) == 0 {
		return nil
	}
	a := int64(d.align)
	bounce := AlignedBuffer(int(min(bounceSize, (int64(len(buf))+3*a)/a*a)))
	for len(buf) > 0 {
		start := off / a * a
		skip := int(off - start)
		n := min(len(buf), len(bounce)-skip)
		span := (int64(skip+n) + a - 1) / a * a
		if err := d.readFull(ctx, bounce[:span], start, skip+n); err != nil {
			return err
		}
		copy(buf, bounce[skip:skip+n])
		buf, off = buf[n:], off+int64(n)
	}
	return nil
}

// readFull reads at least need bytes of buf; a direct read of a file's end
// returns fewer than it was asked for.
func (d *Device) readFull(ctx context.Context, buf []byte, off int64, need int) error {
	for done := 0; done < need; {
		if err := ctx.Err(); err != nil {
			return &ReadError{d.path, kernel.Extent{Offset: off, Length: int64(need)}, err}
		}
		n, err := d.pread(buf[done:min(len(buf), done+maxRead)], off+int64(done))
		// A direct read ends off its alignment only at the end of a file.
		if err == nil && (n == 0 || n%d.align != 0 && done+n < need) {
			err = d.shrunk()
		}
		if err != nil {
			return d.locate(err, off+int64(done), int64(need-done))
		}
		done += n
	}
	return nil
}

func (d *Device) pread(buf []byte, off int64) (n int, err error) {
	ctlErr := d.control(func(fd int) {
		for {
			if n, err = unix.Pread(fd, buf, off); err != unix.EINTR {
				return
			}
		}
	})
	if ctlErr != nil {
		return 0, ctlErr
	}
	return n, err
}

// locate narrows a failed read down to the first block that fails, so that
// the message names bytes that a user can look up.
func (d *Device) locate(cause error, off, length int64) error {
	e := kernel.Extent{Offset: off, Length: length}
	step := int64(max(d.align, kernel.BlockSize))
	if !errors.Is(cause, unix.EIO) || length <= step {
		return &ReadError{d.path, e, cause}
	}
	block := AlignedBuffer(int(step))
	for at := off; at < min(off+length, off+maxRead); at += step {
		if _, err := d.pread(block, at); err != nil {
			return &ReadError{d.path, kernel.Extent{Offset: at, Length: min(step, off+length-at)}, err}
		}
	}
	return &ReadError{d.path, e, cause}
}

func (d *Device) shrunk() error {
	// Seek returns the present size of files and of block devices alike.
	var now int64
	var err error
	if ctlErr := d.control(func(fd int) { now, err = unix.Seek(fd, 0, unix.SEEK_END) }); ctlErr != nil {
		err = ctlErr
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrShrunk, err)
	}
	return fmt.Errorf("%w: it had %d bytes and has %d", ErrShrunk, d.size, now)
}

// Sync writes out what the page caches of the device itself, of its
// partitions, and of the disk that it is a partition of still hold, and
// flushes the device's own cache. It does not sync mounted file systems. A
// kernel that is writing cannot be interrupted: ctx counts between devices.
func (d *Device) Sync(ctx context.Context) error {
	if err := d.file.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", d.path, err)
	}
	if d.kind == File {
		return nil
	}
	relatives, err := host().relatives(d.num)
	if err != nil {
		return fmt.Errorf("sync %s: %w", d.path, err)
	}
	for _, name := range relatives {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("sync %s: %w", d.path, err)
		}
		if err := syncDevice(filepath.Join("/dev", name)); err != nil {
			return fmt.Errorf("sync %s: %w", d.path, err)
		}
	}
	return nil
}

func syncDevice(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOMEDIUM):
		return nil // gone or without medium: nothing is cached
	case err != nil:
		return err
	}
	defer f.Close()
	return f.Sync()
}
