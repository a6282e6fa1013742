// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sectorSize is the unit of the block layer's sectors, whatever the device's
// own sectors are.
const sectorSize = 512

// disk is what sysfs says of a block device.
type disk struct {
	name    string // of the kernel, without /dev/
	dev     uint64 // as stat returns it in st_rdev
	dir     string // in sysfs
	whole   string // directory of the whole disk, if it is a partition, else dir
	sectors uint64
	seq     string // changes when a device number gets another medium
}

// path is the device's node. In sysfs ! stands for / in names.
func (d disk) path() string { return "/dev/" + strings.ReplaceAll(d.name, "!", "/") }

func (d disk) sync() error { return syncNode(d.path()) }

// blockDevice is the number of the block device at a path, which may be a
// symbolic link.
func blockDevice(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("look at %s: it is not a block device", path)
	}
	return st.Rdev, nil
}

// describe reads from sysfs what a device number stands for now.
func describe(dev uint64) (disk, error) {
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + devString(dev))
	if err != nil {
		return disk{}, fmt.Errorf("find device %s: %w", devString(dev), err)
	}
	d := disk{name: filepath.Base(dir), dev: dev, dir: dir, whole: dir}
	if isPartition(dir) {
		d.whole = filepath.Dir(dir)
	}
	d.seq = attribute(d.whole, "diskseq")
	if d.sectors, err = strconv.ParseUint(attribute(dir, "size"), 10, 64); err != nil {
		return disk{}, fmt.Errorf("read the size of %s: %w", d.path(), err)
	}
	return d, nil
}

func isPartition(dir string) bool { return attribute(dir, "partition") != "" }

// attribute is a file of sysfs without its newline, "" if there is none.
func attribute(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// relatives are the devices that share sectors with this one, itself first: a
// disk's partitions, or a partition's disk. Each has a page cache of its own,
// and each can be written to.
func (d disk) relatives() ([]disk, error) {
	out := []disk{d}
	dirs := []string{d.whole}
	if d.dir == d.whole {
		entries, err := os.ReadDir(d.dir)
		if err != nil {
			return nil, fmt.Errorf("list partitions of %s: %w", d.path(), err)
		}
		dirs = nil
		for _, e := range entries {
			if sub := filepath.Join(d.dir, e.Name()); e.IsDir() && isPartition(sub) {
				dirs = append(dirs, sub)
			}
		}
	}
	for _, dir := range dirs {
		dev, err := parseDev(attribute(dir, "dev"))
		if err != nil {
			continue // gone since it was listed
		}
		r, err := describe(dev)
		if err != nil {
			continue
		}
		out = append(out, r)
	}
	return out, nil
}

// refuse says why a device cannot be tracked, or nil.
func (d disk) refuse() error {
	no := func(why string) error { return fmt.Errorf("track %s: %s", d.path(), why) }
	block, err := strconv.ParseUint(attribute(d.whole, "queue/logical_block_size"), 10, 32)
	if err != nil || block < sectorSize {
		return no("the size of its sectors is not known")
	}
	switch {
	case d.sectors == 0:
		return no("it has no size: nothing is attached to it")
	case d.sectors%(block/sectorSize) != 0:
		return no(fmt.Sprintf("its size of %d bytes is no multiple of its sectors of %d", d.sectors*sectorSize, block))
	case attribute(d.dir, "ro") == "1":
		return no("it is read-only, and so never changes")
	case attribute(d.whole, "queue/dax") == "1":
		return no("it allows DAX, by which it is written without the block layer")
	}
	if z := attribute(d.whole, "queue/zoned"); z != "none" && z != "" {
		return no("it is a zoned device")
	}
	return nil
}

// claim makes sure that nobody uses the device: that nobody holds a claim on
// it or has it open for writing. It does not keep the claim, which would
// be in the way of device-mapper's own.
func (d disk) claim(name string) error {
	instead := fmt.Sprintf(": stop that (unmount it), and use /dev/mapper/%s from then on, or track it with --tracker bpf", name)
	f, err := os.OpenFile(d.path(), os.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("track %s: it is %w (mounted, swapped to or built upon)%s", d.path(), ErrInUse, instead)
	}
	if err != nil {
		return fmt.Errorf("track %s: %w", d.path(), err)
	}
	var st unix.Stat_t
	err = errors.Join(unix.Fstat(int(f.Fd()), &st), f.Close())
	if err != nil {
		return fmt.Errorf("track %s: %w", d.path(), err)
	}
	if st.Rdev != d.dev {
		return fmt.Errorf("track %s: its node leads to the device %s instead of %s", d.path(), devString(st.Rdev), devString(d.dev))
	}
	who, err := d.writers()
	if err != nil {
		return err
	}
	if who != "" {
		return fmt.Errorf("track %s: it is %w: %s has it open for writing%s", d.path(), ErrInUse, who, instead)
	}
	return nil
}

// holders lists the devices that are built on this one.
func (d disk) holders() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(d.dir, "holders"))
	if err != nil {
		return nil, fmt.Errorf("list what is built on %s: %w", d.path(), err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, nil
}
