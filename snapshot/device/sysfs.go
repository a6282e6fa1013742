// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// system is where the kernel's file systems are found: a value, so that tests
// can stand up stacks of devices that the machine does not have.
type system struct{ sys, proc, dev, run string }

func host() system { return system{"/sys", "/proc", "/dev", "/run"} }

// dir is the sysfs directory of a block device.
func (s system) dir(num Number) (string, error) {
	d, err := filepath.EvalSymlinks(filepath.Join(s.sys, "dev/block", num.String()))
	if err != nil {
		return "", fmt.Errorf("find block device %s in sysfs: %w", num, err)
	}
	return d, nil
}

// attr is a sysfs attribute without its newline, "" if there is none.
func attr(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.Trim(string(b), " \n\x00")
}

func isPartition(dir string) bool { return attr(dir, "partition") != "" }

// partitions lists the sysfs directories of a disk's partitions.
func partitions(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list partitions: %w", err)
	}
	var out []string
	for _, e := range entries {
		if sub := filepath.Join(dir, e.Name()); e.IsDir() && isPartition(sub) {
			out = append(out, sub)
		}
	}
	return out, nil
}

// relatives names the partitions of a disk, or the disk of a partition: their
// page caches cover the same sectors and are separate.
func (s system) relatives(num Number) ([]string, error) {
	dir, err := s.dir(num)
	if err != nil {
		return nil, err
	}
	if isPartition(dir) {
		return []string{deviceName(filepath.Dir(dir))}, nil
	}
	parts, err := partitions(dir)
	for i, p := range parts {
		parts[i] = deviceName(p)
	}
	return parts, err
}

// deviceName is the name of the node below /dev, where '!' in a kernel name
// stands for '/'.
func deviceName(dir string) string {
	return strings.ReplaceAll(filepath.Base(dir), "!", "/")
}

// holders lists the numbers of the devices that are built on one: by
// device-mapper and md, which the kernel lists, and by bcache.
func (s system) holders(dir string) ([]Number, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "holders"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list holders: %w", err)
	}
	var attrs []string
	for _, e := range entries {
		attrs = append(attrs, filepath.Join(dir, "holders", e.Name()))
	}
	// A backing device links its bcache device, a cache the set it serves.
	attrs = append(attrs, filepath.Join(dir, "bcache/dev"))
	served, err := filepath.Glob(filepath.Join(dir, "bcache/set/bdev*/dev"))
	if err != nil {
		return nil, fmt.Errorf("list holders: %w", err)
	}
	var out []Number
	for _, link := range append(attrs, served...) {
		v := attr(link, "dev")
		if v == "" {
			continue // a holder that went away, or no bcache
		}
		n, err := ParseNumber(v)
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, nil
}

// loopBacking is what a loop device reads from.
type loopBacking struct {
	num  Number // of the loop device
	path string // of the backing file, as the kernel shows it
	dev  Number // of the file system that holds the file, as stat shows it
	ino  uint64
	node Number // of the backing block device, if it is one
}

// loops lists the bound loop devices. Without the privilege to ask the device
// it identifies the backing file by its path.
func (s system) loops() ([]loopBacking, error) {
	dirs, err := filepath.Glob(filepath.Join(s.sys, "block/loop*/loop"))
	if err != nil {
		return nil, fmt.Errorf("list loop devices: %w", err)
	}
	var out []loopBacking
	for _, dir := range dirs {
		disk := filepath.Dir(dir)
		num, err := ParseNumber(attr(disk, "dev"))
		if err != nil {
			continue // gone since it was listed
		}
		l := loopBacking{num: num, path: attr(dir, "backing_file")}
		info, err := loopInfo(filepath.Join(s.dev, filepath.Base(disk)))
		var st unix.Stat_t
		switch {
		case err == nil:
			l.dev, l.ino = Number(info.Device), info.Inode
			// Some kernels repeat the file system's number for a plain file.
			if info.Rdevice != 0 && info.Rdevice != info.Device {
				l.node = Number(info.Rdevice)
			}
		case errors.Is(err, unix.ENXIO):
			continue // unbound since it was listed
		case os.Geteuid() == 0:
			return nil, fmt.Errorf("ask loop device %s for its file: %w", filepath.Base(disk), err)
		case unix.Stat(l.path, &st) == nil:
			l.dev, l.ino = Number(st.Dev), st.Ino
			if st.Mode&unix.S_IFMT == unix.S_IFBLK {
				l.node = Number(st.Rdev)
			}
		}
		out = append(out, l)
	}
	return out, nil
}

func loopInfo(path string) (*unix.LoopInfo64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return unix.IoctlLoopGetStatus64(int(f.Fd()))
}
