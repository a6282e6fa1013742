// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// DataExtents lists the ranges that may hold anything but zeros, in whole
// blocks (the device's last may be short), in device order. Whatever lies
// between them read as zeros at some moment of the call; a caller that tracks
// writes calls it after the rotation, so that a hole filled since is dirty in
// the next epoch. It is exact for files and for loop devices (see
// loopExtents), and one extent for any other device.
func (d *Device) DataExtents(ctx context.Context) ([]kernel.Extent, error) {
	if d.size == 0 {
		return nil, nil
	}
	if d.kind == File {
		return seekExtents(ctx, d.file, 0, d.size)
	}
	if err := d.Sync(ctx); err != nil {
		return nil, err
	}
	extents, ok, err := d.loopExtents(ctx)
	if err != nil {
		return nil, err
	}
	if !ok {
		return []kernel.Extent{{Offset: 0, Length: d.size}}, nil
	}
	return extents, nil
}

// seekExtents finds the data of f between start and start+size, in offsets
// relative to start. Bytes beyond the end of the file count as data: who reads
// them learns that they are missing, instead of taking them for zeros.
func seekExtents(ctx context.Context, f *os.File, start, size int64) ([]kernel.Extent, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("find holes of %s: %w", f.Name(), err)
	}
	var out []kernel.Extent
	end := start + size
	for pos := start; pos < min(end, fi.Size()); {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("find holes of %s: %w", f.Name(), err)
		}
		data, err := f.Seek(pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole up to the end
		}
		if errors.Is(err, unix.EINVAL) {
			return []kernel.Extent{{Offset: 0, Length: size}}, nil // no such notion here
		}
		if err != nil {
			return nil, fmt.Errorf("find holes of %s: %w", f.Name(), err)
		}
		hole, err := f.Seek(data, unix.SEEK_HOLE)
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return nil, fmt.Errorf("find holes of %s: %w", f.Name(), err)
		}
		if err != nil {
			hole = data // truncated in between; the tail below is data
		}
		if data >= end {
			break
		}
		if hole = min(hole, end); hole > data {
			out = append(out, kernel.Extent{Offset: data - start, Length: hole - data})
		}
		pos = max(hole, pos+1)
	}
	// The size is asked again: what a truncation took away must be read.
	if fi, err = f.Stat(); err != nil {
		return nil, fmt.Errorf("find holes of %s: %w", f.Name(), err)
	}
	if tail := max(fi.Size(), start); tail < end {
		out = append(out, kernel.Extent{Offset: tail - start, Length: end - tail})
	}
	return kernel.Align(out, size), nil
}

// Magic numbers of file systems, from linux/magic.h, whose SEEK_HOLE accounts
// for dirty and delayed data exactly and asks no server.
const (
	magicExt   = 0xef53
	magicXFS   = 0x58465342
	magicBtrfs = 0x9123683e
	magicTmpfs = 0x01021994
)

// loopExtents finds the data of a loop device in the holes of its backing
// file, or reports ok=false if that would not be sound. It is sound because:
//
//   - A loop device maps its byte b to the file's byte offset+b and serves reads
//     and writes through the file itself, so a hole of the file reads as zeros
//     of the device; a completed write is in the file's page cache or on its
//     disk, and SEEK_DATA counts both as data.
//   - Dirty pages of the block device's own cache, which the file has not seen,
//     were written out by [Device.Sync] just before. A write that comes later is
//     a write after the scan, as it would be after a read.
//   - The file that we open is the one that the device holds open: device and
//     inode number agree, and an inode that is held open is not recycled. The
//     binding is compared again after the scan.
//   - The file lies on a file system of which SEEK_HOLE is known to be exact.
//   - The (old) loop encryption is off, and bytes behind the end of the file,
//     which read as errors, count as data.
func (d *Device) loopExtents(ctx context.Context) ([]kernel.Extent, bool, error) {
	sys := host()
	dir, err := sys.dir(d.num)
	if err != nil {
		return nil, false, err
	}
	before, err := d.loopStatus()
	if err != nil {
		return nil, false, nil //nolint:nilerr // not a loop device
	}
	path, start := attr(dir, "loop/backing_file"), int64(0)
	if isPartition(dir) {
		sectors, err := strconv.ParseInt(attr(dir, "start"), 10, 64)
		if err != nil {
			return nil, false, fmt.Errorf("find start of partition %s: %w", d.path, err)
		}
		path, start = attr(dir, "../loop/backing_file"), sectors*512
	}
	f, ok := openBacking(path, before)
	if !ok {
		return nil, false, nil
	}
	defer f.Close()
	extents, err := seekExtents(ctx, f, int64(before.Offset)+start, d.size)
	if err != nil {
		return nil, false, err
	}
	after, err := d.loopStatus()
	if err != nil || *after != *before {
		return nil, false, nil //nolint:nilerr // bound anew: the scan says nothing
	}
	return extents, true, nil
}

func (d *Device) loopStatus() (info *unix.LoopInfo64, err error) {
	if ctlErr := d.control(func(fd int) { info, err = unix.IoctlLoopGetStatus64(fd) }); ctlErr != nil {
		return nil, ctlErr
	}
	return info, err
}

// openBacking opens the backing file of a loop device if it is certain to be
// that file, plain, and on a file system that knows its holes.
func openBacking(path string, info *unix.LoopInfo64) (*os.File, bool) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	// The type is checked first: opening a fifo or a tape has effects.
	if info.Encrypt_type != 0 || unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, false
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, false
	}
	fd := int(f.Fd())
	if unix.Fstat(fd, &st) != nil || unix.Fstatfs(fd, &fs) != nil || !sameFile(&st, info) || !knowsHoles(int64(fs.Type)) {
		f.Close()
		return nil, false
	}
	return f, true
}

func sameFile(st *unix.Stat_t, info *unix.LoopInfo64) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFREG && st.Dev == info.Device && st.Ino == info.Inode
}

func knowsHoles(magic int64) bool {
	switch magic {
	case magicExt, magicXFS, magicBtrfs, magicTmpfs:
		return true
	}
	return false
}
