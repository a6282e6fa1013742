// SPDX-License-Identifier: BSD-2-Clause

package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Space is a block device that takes the old content of what is overwritten
// while a snapshot is read.
type Space struct {
	Path string // of its node
	Size int64  // in bytes
	What string // for messages
	file *os.File
}

// Bounds of a space whose size nobody gave.
const (
	minSpace  = 64 << 20
	maxMemory = 4 << 30
)

// memoryPrefix of an argument of --cow asks for memory.
const memoryPrefix = "memory:"

// OpenSpace prepares the space that spec asks for: "memory:SIZE", a block
// device, or a file that does not exist yet, with ":SIZE" behind it if it is not
// to be a tenth of size, the device's. An empty spec takes a file in folder if
// one is given, else memory.
func OpenSpace(spec, folder string, size int64) (*Space, error) {
	tenth := max(size/10, minSpace)
	switch {
	case strings.HasPrefix(spec, memoryPrefix):
		n, err := ParseSize(strings.TrimPrefix(spec, memoryPrefix))
		if err != nil {
			return nil, fmt.Errorf("--cow %s: %w", spec, err)
		}
		return memorySpace(n)
	case spec == "" && folder == "":
		free, err := freeMemory()
		if err != nil {
			return nil, err
		}
		return memorySpace(min(tenth, max(free/4, minSpace), maxMemory))
	case spec == "":
		free, err := freeSpace(folder)
		if err != nil {
			return nil, err
		}
		return fileSpace(filepath.Join(folder, fmt.Sprintf(".cow-%d", os.Getpid())), min(tenth, free/2))
	}
	if st, err := os.Stat(spec); err == nil && st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0 {
		return deviceSpace(spec)
	}
	if i := strings.LastIndexByte(spec, ':'); i > 0 {
		n, err := ParseSize(spec[i+1:])
		if err != nil {
			return nil, fmt.Errorf("--cow %s: %w", spec, err)
		}
		return fileSpace(spec[:i], n)
	}
	return fileSpace(spec, tenth)
}

// ParseSize reads a number of bytes with K, M, G or T behind it, or nothing.
func ParseSize(s string) (int64, error) {
	shift := 0
	if n := len(s); n > 0 {
		if i := strings.IndexByte("KMGT", s[n-1]&^0x20); i >= 0 {
			shift, s = 10*(i+1), s[:n-1]
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > 1<<62>>shift {
		return 0, fmt.Errorf("%q is no size: want a number with K, M, G or T behind it", s)
	}
	return n << shift, nil
}

// freeMemory is what could be had without swapping, in bytes.
func freeMemory() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("look for free memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, errors.New("look for free memory: /proc/meminfo does not say")
}

func freeSpace(folder string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(folder, &st); err != nil {
		return 0, fmt.Errorf("look for free space in %s: %w", folder, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

func memorySpace(size int64) (*Space, error) {
	fd, err := unix.MemfdCreate("dsync-backup-cow", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make copy-on-write space: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	return attach(f, size, false, "copy-on-write space in memory")
}

// fileSpace makes a sparse file that goes away with its last user, whatever
// becomes of this process.
func fileSpace(path string, size int64) (*Space, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make copy-on-write space: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return nil, errors.Join(fmt.Errorf("make copy-on-write space: %w", err), f.Close())
	}
	return attach(f, size, true, "copy-on-write space in "+filepath.Dir(path))
}

func deviceSpace(path string) (*Space, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("--cow %s: the device is in use", path)
	}
	if err != nil {
		return nil, fmt.Errorf("--cow: %w", err)
	}
	defer f.Close() // device-mapper claims it for itself
	n, err := f.Seek(0, 2)
	if err != nil {
		return nil, fmt.Errorf("--cow %s: %w", path, err)
	}
	return &Space{Path: path, Size: n, What: "copy-on-write space " + path}, nil
}

// attach puts a loop device on a file. It goes away by itself with its last
// user, and with it the file.
func attach(f *os.File, size int64, direct bool, what string) (*Space, error) {
	size = size / 4096 * 4096
	s := &Space{Size: size, What: what}
	err := f.Truncate(size)
	for tries := 0; err == nil; tries++ {
		if s.file, s.Path, err = attachFree(f, direct); !errors.Is(err, unix.EBUSY) || tries == 100 {
			break
		}
		err = nil // somebody else took that one
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make %s: %w", what, err), f.Close())
	}
	return s, f.Close() // the loop device has it open
}

func attachFree(f *os.File, direct bool) (*os.File, string, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, "", fmt.Errorf("find a free loop device: %w", err)
	}
	path := fmt.Sprintf("/dev/loop%d", n)
	loop, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	c := unix.LoopConfig{Fd: uint32(f.Fd()), Size: 4096}
	c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if direct {
		c.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	err = unix.IoctlLoopConfigure(int(loop.Fd()), &c)
	if errors.Is(err, unix.EINVAL) && direct {
		// Not every file system can.
		c.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &c)
	}
	if err != nil {
		return nil, "", errors.Join(fmt.Errorf("attach %s: %w", path, err), loop.Close())
	}
	return loop, path, nil
}

// Close lets go of the space. What still uses it keeps it.
func (s *Space) Close() error {
	if s == nil || s.file == nil {
		return nil
	}
	err := s.file.Close()
	s.file = nil
	return err
}
