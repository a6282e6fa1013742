// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Mount is a mounted file system, listed once however often it is mounted.
type Mount struct {
	Path     string   `json:"path"`             // a mount point, in the namespace where it was found
	Others   []string `json:"others,omitempty"` // its further mount points (bind mounts, subvolumes)
	Type     string   `json:"type"`
	Source   string   `json:"source"`
	Dev      Number   `json:"dev"`     // of the superblock; anonymous for btrfs
	Devices  []Number `json:"devices"` // those that it lies on, of the stack asked for
	ReadOnly bool     `json:"read_only"`
	// Depth is 0 for a file system right on the device, and greater the more
	// devices and file systems lie between: freeze from the greatest down.
	Depth int `json:"depth"`

	points  []mountEntry
	via     string // the path to open from here, "" if none leads to it
	id      uint64 // the mount that via leads to
	options string // of the superblock
}

// Open opens the root of the mount for reading, from any namespace. It fails
// if no mount point can be reached or if the mount has gone since it was listed.
func (m Mount) Open() (*os.File, error) {
	if m.via == "" {
		return nil, fmt.Errorf("open %s file system mounted at %s: no path leads to it", m.Type, m.Path)
	}
	return openMount(m.via, m.id)
}

func (m Mount) String() string {
	mode := "read-write"
	if m.ReadOnly {
		mode = "read-only"
	}
	return fmt.Sprintf("%s (%s, %s)", m.Path, m.Type, mode)
}

// Mounts lists every mounted file system that lives on a block device, on its
// partitions, or on anything stacked above it: device-mapper, md, bcache, and
// loop devices whose backing file or device belongs to the stack. Of a regular
// file it lists those on loop devices that read it. All mount namespaces with
// a process in them that we may look at are searched; what that misses,
// [Use.CheckFreezable] reports. The deepest comes last.
func Mounts(path string) ([]Mount, error) {
	st, err := host().climb(path)
	if err != nil {
		return nil, err
	}
	return st.list(), nil
}

// superblocks groups mount entries by file system, each with the mount points
// nearest to its root and to our own namespace first.
func superblocks(entries []mountEntry) map[Number]*Mount {
	out := make(map[Number]*Mount)
	for _, e := range entries {
		m := out[e.num]
		if m == nil {
			m = &Mount{Type: e.fsType, Source: e.source, Dev: e.num, ReadOnly: e.readOnly, options: e.options}
			out[e.num] = m
		}
		m.points = append(m.points, e)
	}
	for _, m := range out {
		slices.SortStableFunc(m.points, func(a, b mountEntry) int {
			return cmp.Or(foreign(a)-foreign(b), len(a.root)-len(b.root))
		})
		m.Path = m.points[0].point
	}
	return out
}

func foreign(e mountEntry) int {
	if e.processID == "self" {
		return 0
	}
	return 1
}

// reach finds a mount point of the file system that can be opened, and makes
// it its Path.
func (s system) reach(m *Mount) {
	for _, e := range m.points {
		if f, err := openMount(e.via(s.proc), e.id); err == nil {
			f.Close()
			m.Path, m.via, m.id = e.point, e.via(s.proc), e.id
			break
		}
	}
	m.Others = nil
	for _, e := range m.points {
		if e.point != m.Path && !slices.Contains(m.Others, e.point) {
			m.Others = append(m.Others, e.point)
		}
	}
}

// devicesOf lists the block devices that a file system lies on. That of a
// btrfs has an anonymous number, and several devices.
func (s system) devicesOf(m *Mount) ([]Number, error) {
	if m.Type != "btrfs" {
		if m.Dev.Anonymous() {
			return nil, nil
		}
		return []Number{m.Dev}, nil
	}
	s.reach(m)
	f, err := m.Open()
	if err != nil {
		return sourceOf(m)
	}
	defer f.Close()
	id, err := btrfsID(f)
	if err != nil {
		return nil, fmt.Errorf("identify btrfs at %s: %w", m.Path, err)
	}
	links, err := filepath.Glob(filepath.Join(s.sys, "fs/btrfs", id, "devices/*"))
	if err != nil {
		return nil, fmt.Errorf("list devices of btrfs %s: %w", id, err)
	}
	var out []Number
	for _, l := range links {
		n, err := ParseNumber(attr(l, "dev"))
		if err != nil {
			return nil, fmt.Errorf("list devices of btrfs %s: %w", id, err)
		}
		out = append(out, n)
	}
	return out, nil
}

// sourceOf falls back on the device that a mount was made with. What this
// misses of a btrfs that cannot be opened shows as a claim of unknown purpose.
func sourceOf(m *Mount) ([]Number, error) {
	var st unix.Stat_t
	if unix.Stat(m.Source, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil, nil //nolint:nilerr // see above
	}
	return []Number{Number(st.Rdev)}, nil
}

// btrfsID asks for the UUID under which sysfs lists the file system: the
// ioctl BTRFS_IOC_FS_INFO and its argument are in linux/btrfs.h.
func btrfsID(f *os.File) (string, error) {
	// _IOR(0x94, 31, char[1024]), with the direction bits of this architecture.
	const fsInfo = unix.BLKGETSIZE64&0xe0000000 | 1024<<16 | 0x94<<8 | 31
	var arg struct {
		maxID, devices uint64
		fsid           [16]byte
		_              [1024 - 32]byte
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsInfo, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return "", errno
	}
	return formatUUID(arg.fsid[:]), nil
}

func (st *stack) list() []Mount {
	return slices.SortedFunc(func(yield func(Mount) bool) {
		for m := range maps.Values(st.mounts) {
			if !yield(*m) {
				return
			}
		}
	}, func(a, b Mount) int { return cmp.Or(cmp.Compare(a.Depth, b.Depth), cmp.Compare(a.Dev, b.Dev)) })
}
