// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// maxDepth bounds a stack: the kernel refuses deeper ones long before, and a
// loop that feeds on itself must not hang us.
const maxDepth = 64

// stack is everything above a device or file: devices with their depth, and
// the file systems on them.
type stack struct {
	sys     system
	start   Number // 0 for a file
	file    unix.Stat_t
	depth   map[Number]int
	dirs    map[Number]string   // in sysfs
	above   map[Number][]Number // partitions and holders: what claims the device
	mounts  map[Number]*Mount
	entries []mountEntry
	loops   []loopBacking
}

// climb finds the stack above a path, growing it until nothing is added:
// partitions and holders of a device, file systems on it, loop devices whose
// file or device belongs to the stack, and again.
func (s system) climb(path string) (*stack, error) {
	st := &stack{
		sys: s, depth: map[Number]int{}, dirs: map[Number]string{},
		above: map[Number][]Number{}, mounts: map[Number]*Mount{},
	}
	if err := unix.Stat(path, &st.file); err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	var err error
	if st.entries, err = s.allMounts(); err != nil {
		return nil, err
	}
	if st.loops, err = s.loops(); err != nil {
		return nil, err
	}
	switch st.file.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		st.start = Number(st.file.Rdev)
		if err := st.add(st.start, 0); err != nil {
			return nil, err
		}
	case unix.S_IFREG:
		if err := st.addLoopsOnFile(); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("look at %s: %w", path, ErrNotDevice)
	}
	return st, st.grow()
}

func (st *stack) grow() error {
	supers := superblocks(st.entries)
	owners := make(map[Number][]Number, len(supers))
	for num, m := range supers {
		devices, err := st.sys.devicesOf(m)
		if err != nil {
			return err
		}
		owners[num] = devices
	}
	for grew := true; grew; {
		grew = false
		for num, m := range supers {
			grew = st.addMount(m, owners[num]) || grew
		}
		for _, l := range st.loops {
			more, err := st.addLoop(l)
			if err != nil {
				return err
			}
			grew = grew || more
		}
	}
	for _, m := range st.mounts {
		st.sys.reach(m)
	}
	return nil
}

// add puts a device and what the kernel builds on it into the stack, or lifts
// them if they are there at a smaller depth.
func (st *stack) add(num Number, depth int) error {
	if old, ok := st.depth[num]; ok && old >= depth {
		return nil
	}
	if depth > maxDepth {
		return fmt.Errorf("climb stack of devices: more than %d above each other at %s", maxDepth, num)
	}
	dir, err := st.sys.dir(num)
	if err != nil {
		return err
	}
	st.depth[num], st.dirs[num] = depth, dir
	parts, err := partitions(dir)
	if err != nil {
		return err
	}
	for _, p := range parts {
		n, err := ParseNumber(attr(p, "dev"))
		if err != nil {
			return err
		}
		if err := st.addAbove(num, n, depth); err != nil {
			return err
		}
	}
	holders, err := st.sys.holders(dir)
	if err != nil {
		return err
	}
	for _, n := range holders {
		if err := st.addAbove(num, n, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (st *stack) addAbove(below, num Number, depth int) error {
	if !slices.Contains(st.above[below], num) {
		st.above[below] = append(st.above[below], num)
	}
	return st.add(num, depth)
}

// addMount takes in a file system that lies on a device of the stack, and
// reports whether that changed anything.
func (st *stack) addMount(m *Mount, devices []Number) (grew bool) {
	depth, on := 0, []Number(nil)
	for _, n := range devices {
		if d, ok := st.depth[n]; ok {
			on, depth = append(on, n), max(depth, d)
		}
	}
	if len(on) == 0 {
		return false
	}
	old, known := st.mounts[m.Dev]
	if known && old.Depth >= depth && len(old.Devices) == len(on) {
		return false
	}
	m.Devices, m.Depth = on, depth
	st.mounts[m.Dev] = m
	return true
}

func (st *stack) addLoopsOnFile() error {
	for _, l := range st.loops {
		if l.node == 0 && l.dev == Number(st.file.Dev) && l.ino == st.file.Ino {
			if err := st.add(l.num, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// addLoop takes in a loop device that is fed by the stack.
func (st *stack) addLoop(l loopBacking) (grew bool, err error) {
	depth := 0
	if l.node != 0 {
		d, ok := st.depth[l.node]
		if !ok {
			return false, nil
		}
		depth = d + 1
	} else {
		m := st.holding(l)
		if m == nil {
			return false, nil
		}
		depth = m.Depth + 1
	}
	if old, ok := st.depth[l.num]; ok && old >= depth {
		return false, nil
	}
	return true, st.add(l.num, depth)
}

// holding is the file system of the stack that holds the loop's file. Files in
// btrfs subvolumes show a number of their own, so there the mount of the path
// counts; if the path leads nowhere and the number is nobody's, the file is
// taken to lie on a btrfs of the stack, if there is one: a freeze too many.
func (st *stack) holding(l loopBacking) *Mount {
	if m := st.mounts[l.dev]; m != nil {
		return m
	}
	if !l.dev.Anonymous() || slices.ContainsFunc(st.entries, func(e mountEntry) bool { return e.num == l.dev }) {
		return nil
	}
	if num, ok := st.locate(l); ok {
		return st.mounts[num]
	}
	for _, m := range st.mounts {
		if m.Type == "btrfs" {
			return m
		}
	}
	return nil
}

// locate finds the superblock that holds a loop's file, by its path in any of
// the namespaces.
func (st *stack) locate(l loopBacking) (Number, bool) {
	tried := make(map[string]bool)
	for _, e := range st.entries {
		if tried[e.processID] {
			continue
		}
		tried[e.processID] = true
		path := l.path
		if e.processID != "self" {
			path = filepath.Join(st.sys.proc, e.processID, "root", l.path)
		}
		var file unix.Stat_t
		if unix.Stat(path, &file) != nil || Number(file.Dev) != l.dev || file.Ino != l.ino {
			continue
		}
		id, err := mountID(unix.AT_FDCWD, path, 0)
		if err != nil {
			continue
		}
		for _, e := range st.entries {
			if e.id == id {
				return e.num, true
			}
		}
	}
	return 0, false
}
