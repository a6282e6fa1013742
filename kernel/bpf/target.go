// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// sectorSize is the unit of the block layer's sectors, whatever the device's
// own sectors are.
const sectorSize = 512

// devno is a device number.
type devno struct{ major, minor uint32 }

func (d devno) String() string { return fmt.Sprintf("%d:%d", d.major, d.minor) }

// target is what a tracker watches: a sector range of a disk. Two targets are
// the same device if and only if they are equal but for their names.
type target struct {
	name    string // of the kernel, without /dev/
	dev     devno
	disk    string // the whole disk's name
	diskDev devno
	diskSeq uint64 // rises whenever a device number gets another medium
	start   uint64 // first sector on the disk
	sectors uint64

	// loopOffset is where a loop device begins in its file, in bytes. Moving
	// it changes the content without a write.
	loopOffset uint64

	// mapped: a device-mapper device, which takes bios, not requests.
	mapped bool
}

func (t target) size() int64   { return int64(t.sectors) * sectorSize }
func (t target) blocks() int64 { return kernel.BlocksOf(t.size()) }
func (t target) words() uint32 { return uint32((t.blocks() + 63) / 64) }
func (t target) path() string  { return nodePath(t.name) }

// nodePath is the device node of a kernel name, in which sysfs writes ! for /.
func nodePath(name string) string { return "/dev/" + strings.ReplaceAll(name, "!", "/") }

// resolve finds the block device behind a path, which may be a symbolic link.
func resolve(device string) (target, error) {
	dev, err := deviceNumber(device)
	if err != nil {
		return target{}, err
	}
	t, err := describe(dev)
	if err != nil {
		return target{}, fmt.Errorf("look at %s: %w", device, err)
	}
	return t, nil
}

func deviceNumber(device string) (devno, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return devno{}, fmt.Errorf("look at %s: %w", device, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return devno{}, fmt.Errorf("look at %s: it is not a block device", device)
	}
	return devno{unix.Major(st.Rdev), unix.Minor(st.Rdev)}, nil
}

// describe reads from sysfs what a device number stands for now.
func describe(dev devno) (target, error) {
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + dev.String())
	if err != nil {
		return target{}, fmt.Errorf("find device %s: %w", dev, err)
	}
	t := target{name: filepath.Base(dir), dev: dev, disk: filepath.Base(dir), diskDev: dev}
	diskDir := dir
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		diskDir = filepath.Dir(dir)
		t.disk = filepath.Base(diskDir)
		if t.start, err = readNumber(filepath.Join(dir, "start")); err != nil {
			return target{}, err
		}
		if t.diskDev, err = readDevno(filepath.Join(diskDir, "dev")); err != nil {
			return target{}, err
		}
	}
	if t.sectors, err = readNumber(filepath.Join(dir, "size")); err != nil {
		return target{}, err
	}
	if t.diskSeq, err = readNumber(filepath.Join(diskDir, "diskseq")); err != nil {
		return target{}, err
	}
	t.mapped = exists(filepath.Join(diskDir, "dm"))
	if offset := filepath.Join(diskDir, "loop", "offset"); exists(offset) {
		if t.loopOffset, err = readNumber(offset); err != nil {
			return target{}, err
		}
	}
	return t, nil
}

func (t target) sysfs(parts ...string) string {
	return filepath.Join(append([]string{"/sys/block", t.disk}, parts...)...)
}

// refuse says why a device cannot be tracked, or nil. Whatever is not known to
// pass each write through requests of its own disk is refused.
func (t target) refuse() error {
	no := func(why string) error {
		return fmt.Errorf("track %s: %s", t.path(), why)
	}
	if t.sectors == 0 {
		return no("it has no size: nothing is attached to it")
	}
	if t.blocks() > 1<<37 {
		return no("it is larger than 512 TiB")
	}
	if exists(t.sysfs("md")) {
		return no("it is a software RAID device, and its completions cannot be seen from here: track it with the dm tracker, or track the disks below")
	}
	if t.mapped {
		if err := t.refuseMapped(no); err != nil {
			return err
		}
	} else if below, err := os.ReadDir(t.sysfs("slaves")); err == nil && len(below) > 0 {
		return no("it is stacked on " + below[0].Name() + ": track that one instead")
	} else if !exists(t.sysfs("mq")) {
		return no("its driver takes bios instead of requests (as zram, pmem, DRBD and NVMe multipath do), and their completions are not proven to be seen")
	}
	if z := readText(t.sysfs("queue/zoned")); z != "none" && z != "" {
		return no("it is a zoned device")
	}
	if readText(t.sysfs("queue/dax")) == "1" {
		return no("it allows DAX, by which it is written without the block layer")
	}
	if readText(t.sysfs("hidden")) == "1" {
		return no("it is one path of a multipath device")
	}
	// Device-mapper counts, whatever stands there.
	if !t.mapped && readText(t.sysfs("queue/iostats")) != "1" {
		return no("it does not count its writes in flight: write 1 to " + t.sysfs("queue/iostats"))
	}
	return t.refuseMultipath()
}

func (t target) refuseMultipath() error {
	holders, err := os.ReadDir(t.sysfs("holders"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read holders of %s: %w", t.disk, err)
	}
	for _, h := range holders {
		if strings.HasPrefix(readText(t.sysfs("holders", h.Name(), "dm/uuid")), "mpath-") {
			return fmt.Errorf("track %s: it is one path of the multipath device %s, which writes through its other paths too", t.path(), h.Name())
		}
	}
	return nil
}

// wants reports whether the target's tracker has the program of that name.
func (t target) wants(program string) bool {
	switch kind, _, _ := strings.Cut(program, "_"); {
	case strings.HasPrefix(program, "bio_complete_"), program == objectProgTableSwap:
		return t.mapped
	case kind == "rq":
		return !t.mapped
	}
	return true
}

// maxBios is how many bios a device that takes bios may hold. Nothing bounds
// them but memory: they wait for a resume, or for a target's worker.
const maxBios = 1 << 16

// requests estimates how many requests the disk's driver and scheduler can
// have in flight, or how many bios, for the size of the table that holds them.
func (t target) requests() uint32 {
	if t.mapped {
		return maxBios
	}
	queues := 1
	if hw, err := os.ReadDir(t.sysfs("mq")); err == nil {
		queues = max(1, len(hw))
	}
	depth, _ := readNumber(t.sysfs("queue/nr_requests"))
	return uint32(min(4096+4*depth*uint64(queues), 1<<20))
}

// nodes lists the device nodes whose page caches may hold dirty pages of the
// target, the target's own first: each of a disk and its partitions has one.
func (t target) nodes() []string {
	out := []string{t.path()}
	if t.dev != t.diskDev {
		return append(out, nodePath(t.disk))
	}
	entries, _ := os.ReadDir(t.sysfs())
	for _, e := range entries {
		if exists(t.sysfs(e.Name(), "partition")) {
			out = append(out, nodePath(e.Name()))
		}
	}
	return out
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func readText(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func readNumber(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read device attribute: %w", err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("parse %s: %w", path, err)
	}
	return n, nil
}

func readDevno(path string) (d devno, err error) {
	if _, err = fmt.Sscanf(readText(path), "%d:%d", &d.major, &d.minor); err != nil {
		err = fmt.Errorf("parse %s: %w", path, err)
	}
	return d, err
}
