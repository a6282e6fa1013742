// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Errors on which callers decide. Test with errors.Is.
var (
	// ErrInUse says that a claim failed, or that a target must not be
	// written to; the text names the users that were found.
	ErrInUse = errors.New("device is in use")
	// ErrShrunk says that the device ended before the size it had when it
	// was opened.
	ErrShrunk = errors.New("device shrank while it was read")
	// ErrNotDevice says that the path is neither a block device nor a
	// regular file.
	ErrNotDevice = errors.New("neither a block device nor a regular file")
)

// Kind says what a path names.
type Kind string

// The kinds of sources and targets.
const (
	Block Kind = "block"
	File  Kind = "file"
)

// Number is a device number as stat returns it in st_rdev and st_dev.
type Number uint64

// MakeNumber joins a major and a minor number.
func MakeNumber(major, minor uint32) Number { return Number(unix.Mkdev(major, minor)) }

// ParseNumber reads "major:minor".
func ParseNumber(s string) (Number, error) {
	a, b, ok := strings.Cut(strings.TrimSpace(s), ":")
	major, err1 := strconv.ParseUint(a, 10, 32)
	minor, err2 := strconv.ParseUint(b, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("parse device number %q: want major:minor", s)
	}
	return MakeNumber(uint32(major), uint32(minor)), nil
}

// Anonymous reports a number that names no block device: that of a btrfs or
// of a network file system, say.
func (n Number) Anonymous() bool { return unix.Major(uint64(n)) == 0 }

func (n Number) String() string {
	return fmt.Sprintf("%d:%d", unix.Major(uint64(n)), unix.Minor(uint64(n)))
}

// MarshalText writes "major:minor".
func (n Number) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText reads "major:minor".
func (n *Number) UnmarshalText(b []byte) (err error) {
	*n, err = ParseNumber(string(b))
	return err
}

// Options of Open.
type Options struct {
	// Exclusive claims a block device for as long as it is open, so that
	// nobody can mount it, build upon it or claim it. It has no meaning for a
	// regular file. The claim counts as a use in [InUse]: ask that first.
	Exclusive bool
}

// Device is an open block device or image file. Its methods may be called
// from many goroutines.
type Device struct {
	file   *os.File
	path   string // as given, cleaned, absolute
	real   string // without symbolic links
	kind   Kind
	num    Number // of the block device, 0 for a file
	size   int64
	sector int // logical block size of a block device, bytes
	align  int // of direct reads in offset, length and memory; 1: buffered
}

// Open opens a block device or a regular file for reading, by any path.
// Block devices are read with O_DIRECT or not at all; a file on a file system
// that has no direct reads is read through the page cache, which is coherent
// for a file. A failed claim is ErrInUse.
func Open(path string, o Options) (*Device, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open device %s: %w", path, err)
	}
	d := &Device{path: abs}
	if d.real, err = filepath.EvalSymlinks(abs); err != nil {
		return nil, fmt.Errorf("open device: %w", err)
	}
	if d.kind, err = kindOf(d.real); err != nil {
		return nil, err
	}
	if err := d.open(o); err != nil {
		return nil, err
	}
	if err := d.measure(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func kindOf(path string) (Kind, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("look at device: %w", err)
	}
	switch mode := fi.Mode(); {
	case mode.IsRegular():
		return File, nil
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		return Block, nil
	}
	return "", fmt.Errorf("look at %s: %w", path, ErrNotDevice)
}

func (d *Device) open(o Options) error {
	flags := os.O_RDONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_DIRECT
	if d.kind == Block && o.Exclusive {
		flags |= unix.O_EXCL
	}
	f, err := os.OpenFile(d.real, flags, 0)
	switch {
	case errors.Is(err, unix.EINVAL) && d.kind == File:
		f, err = os.OpenFile(d.real, flags&^unix.O_DIRECT, 0)
		d.align = 1
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("open %s: no direct reads, and through the page cache a device's reads may be stale: %w", d.path, err)
	case errors.Is(err, unix.EBUSY) && o.Exclusive:
		return fmt.Errorf("open %s: %w: %s", d.path, ErrInUse, describeUse(d.real))
	}
	if err != nil {
		return fmt.Errorf("open device: %w", err)
	}
	d.file = f
	return nil
}

func describeUse(path string) string {
	use, err := InUse(path)
	if err != nil {
		return err.Error()
	}
	return use.String()
}

func (d *Device) measure() error {
	var st unix.Stat_t
	var statErr, sectorErr error
	sector := uint32(512)
	err := d.control(func(fd int) {
		statErr = unix.Fstat(fd, &st)
		if d.kind == Block {
			sector, sectorErr = unix.IoctlGetUint32(fd, unix.BLKSSZGET)
		} else if d.align == 0 {
			d.align = fileAlignment(fd)
		}
	})
	if err := errors.Join(err, statErr, sectorErr); err != nil {
		return fmt.Errorf("measure %s: %w", d.path, err)
	}
	want := uint32(unix.S_IFREG)
	if d.kind == Block {
		want = unix.S_IFBLK
		d.num, d.align = Number(st.Rdev), int(sector)
	}
	if st.Mode&unix.S_IFMT != want {
		return fmt.Errorf("measure %s: it was replaced while it was opened", d.path)
	}
	d.sector = int(sector)
	d.size, err = d.file.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("measure %s: %w", d.path, err)
	}
	return nil
}

// fileAlignment is what the file system asks of direct reads. Where it does
// not say, a page satisfies all that are known.
func fileAlignment(fd int) int {
	var st unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 || st.Dio_offset_align == 0 {
		return pageSize
	}
	return int(max(st.Dio_offset_align, st.Dio_mem_align))
}

// control runs fn with the descriptor, which stays open meanwhile. Unlike the
// Read of a raw connection it does not serialise its callers.
func (d *Device) control(fn func(fd int)) error {
	rc, err := d.file.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Control(func(fd uintptr) { fn(int(fd)) })
}

// Close gives up the device and any claim on it.
func (d *Device) Close() error { return d.file.Close() }

// Path is the path as it was given to Open, cleaned and absolute.
func (d *Device) Path() string { return d.path }

// RealPath is the path without symbolic links.
func (d *Device) RealPath() string { return d.real }

// Kind says whether this is a block device or a file.
func (d *Device) Kind() Kind { return d.kind }

// Size is the size in bytes that the device had when it was opened.
func (d *Device) Size() int64 { return d.size }

// LogicalBlockSize is a block device's logical block size in bytes, and 512
// for a file. [Device.ReadExtent] does not ask its callers to respect it.
func (d *Device) LogicalBlockSize() int { return d.sector }

// Dev is the number of the block device, 0 for a file.
func (d *Device) Dev() Number { return d.num }

// Direct reports whether reads bypass the page cache, as they always do for a
// block device.
func (d *Device) Direct() bool { return d.align > 1 }
