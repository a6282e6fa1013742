// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Use is who uses a device, its partitions, and what is stacked above it.
type Use struct {
	Mounts  []Mount  `json:"mounts,omitempty"`
	Swaps   []string `json:"swaps,omitempty"`   // swap partitions and files, as /proc/swaps names them
	Holders []string `json:"holders,omitempty"` // kernel names of the devices stacked above: dm-0, loop3
	// Claimed names devices of the stack that somebody holds exclusively
	// with none of the above to explain it: a ZFS pool, a file system that
	// is mounted out of sight, another backup.
	Claimed []string `json:"claimed,omitempty"`
}

// Empty reports that nobody uses the device, as far as can be seen: an open
// without a claim leaves no trace.
func (u Use) Empty() bool {
	return len(u.Mounts)+len(u.Swaps)+len(u.Holders)+len(u.Claimed) == 0
}

// ReadWrite reports that a file system on the device is mounted read-write,
// so that a plain copy is no point in time.
func (u Use) ReadWrite() bool {
	return slices.ContainsFunc(u.Mounts, func(m Mount) bool { return !m.ReadOnly })
}

// CheckFreezable reports users that freezing Mounts would not hold still,
// because it is not known what they are. (Swap is not held still either, but
// what it holds means nothing after a restore.)
func (u Use) CheckFreezable() error {
	if len(u.Claimed) > 0 {
		return fmt.Errorf("find what to freeze: %w by something that is neither a mounted file system nor swap: %s",
			ErrInUse, strings.Join(u.Claimed, ", "))
	}
	return nil
}

// String says it in one line, for messages.
func (u Use) String() string {
	var parts []string
	for _, m := range u.Mounts {
		parts = append(parts, "mounted at "+m.String())
	}
	for _, s := range u.Swaps {
		parts = append(parts, "swap on "+s)
	}
	for _, h := range u.Holders {
		parts = append(parts, "held by "+h)
	}
	for _, c := range u.Claimed {
		parts = append(parts, c+" is claimed by an unknown user")
	}
	if len(parts) == 0 {
		return "not in use"
	}
	return strings.Join(parts, ", ")
}

// InUse says who uses a block device or a regular file. Looking for claims
// opens devices that nobody is known to use exclusively, for an instant.
func InUse(path string) (Use, error) {
	st, err := host().climb(path)
	if err != nil {
		return Use{}, err
	}
	use := Use{Mounts: st.list()}
	swapped, err := st.swaps(&use)
	if err != nil {
		return Use{}, err
	}
	for num, dir := range st.dirs {
		if num != st.start && !(isPartition(dir) && st.depth[num] == 0 && st.start != 0) {
			use.Holders = append(use.Holders, deviceName(dir))
		}
	}
	slices.Sort(use.Holders)
	for num, dir := range st.dirs {
		if st.explained(num, swapped) {
			continue
		}
		claimed, err := st.claimed(num, dir)
		if err != nil {
			return Use{}, err
		}
		if claimed {
			use.Claimed = append(use.Claimed, deviceName(dir))
		}
	}
	slices.Sort(use.Claimed)
	return use, nil
}

// CheckTarget refuses with ErrInUse, saying by what, a restore target that is
// mounted, swapped to, held or claimed. A file that does not exist is free.
func CheckTarget(path string) error {
	use, err := InUse(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !use.Empty() {
		return fmt.Errorf("check target %s: %w: %s", path, ErrInUse, use)
	}
	return nil
}

// explained reports that a claim on the device has a known reason: then it
// need not be looked for. A disk is claimed as a whole with any partition.
func (st *stack) explained(num Number, swapped map[Number]bool) bool {
	if swapped[num] {
		return true
	}
	for _, m := range st.mounts {
		if slices.Contains(m.Devices, num) {
			return true
		}
	}
	for _, n := range st.above[num] {
		if !isPartition(st.dirs[n]) || st.explained(n, swapped) {
			return true
		}
		if busy, err := st.claimed(n, st.dirs[n]); err == nil && busy {
			return true
		}
	}
	return false
}

// claimed tries to claim the device for itself.
func (st *stack) claimed(num Number, dir string) (bool, error) {
	path := filepath.Join(st.sys.dev, deviceName(dir))
	var node unix.Stat_t
	if err := unix.Stat(path, &node); err != nil || Number(node.Rdev) != num {
		return false, fmt.Errorf("look for a claim on device %s: no node %s for it", num, path)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOMEDIUM):
		return false, nil
	case err != nil && os.Geteuid() != 0:
		return false, nil //nolint:nilerr // who may not open it cannot write to it either
	case err != nil:
		return false, fmt.Errorf("look for a claim: %w", err)
	}
	return false, f.Close()
}

// swaps adds the swap areas on devices and files of the stack, and returns
// the devices among them.
func (st *stack) swaps(use *Use) (map[Number]bool, error) {
	f, err := os.Open(filepath.Join(st.sys.proc, "swaps"))
	if err != nil {
		return nil, fmt.Errorf("list swap areas: %w", err)
	}
	defer f.Close()
	swapped := make(map[Number]bool)
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		name, _, _ := strings.Cut(sc.Text(), " ")
		name = unescape(strings.TrimRight(name, "\t"))
		var file unix.Stat_t
		if !filepath.IsAbs(name) || unix.Stat(name, &file) != nil {
			continue // the heading, or a path of another namespace: a claim tells
		}
		if file.Mode&unix.S_IFMT == unix.S_IFBLK {
			num := Number(file.Rdev)
			if _, ok := st.depth[num]; ok {
				swapped[num] = true
				use.Swaps = append(use.Swaps, name)
			}
			continue
		}
		if st.isFile(&file) || st.holds(name) {
			use.Swaps = append(use.Swaps, name)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("list swap areas: %w", err)
	}
	return swapped, nil
}

func (st *stack) isFile(file *unix.Stat_t) bool {
	return st.start == 0 && file.Dev == st.file.Dev && file.Ino == st.file.Ino
}

// holds reports whether a path lies on a file system of the stack.
func (st *stack) holds(path string) bool {
	id, err := mountID(unix.AT_FDCWD, path, 0)
	if err != nil {
		return false
	}
	for _, e := range st.entries {
		if e.id == id {
			return st.mounts[e.num] != nil
		}
	}
	return false
}
