// SPDX-License-Identifier: BSD-2-Clause

package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// udevWait is how long a node is left to udev before it is made or removed
// here.
const udevWait = 10 * time.Second

// Path is the node of a device by its name. Use it for names that [CheckName]
// lets pass.
func Path(name string) string { return filepath.Join("/dev", unix.DM_DIR, name) }

// udevMakesNodes reports whether udev runs and has rules for device-mapper,
// which come with dmsetup, not with udev.
func udevMakesNodes() bool {
	if _, err := os.Stat("/run/udev/control"); err != nil {
		return false
	}
	for _, dir := range []string{"/etc", "/run", "/usr/lib", "/lib"} {
		rules, err := filepath.Glob(filepath.Join(dir, "udev/rules.d/*-dm.rules"))
		if err == nil && len(rules) > 0 {
			return true
		}
	}
	return false
}

// leadsTo reports whether a path is a node of the device, or a link to one.
func leadsTo(path string, dev uint64) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == dev
}

// EnsureNode makes sure that /dev/mapper/NAME leads to the device: it waits for
// udev where that runs, up to ten seconds, and else makes the node itself.
func EnsureNode(ctx context.Context, info Info) error {
	path := Path(info.Name)
	if err := CheckName(info.Name); err != nil {
		return err // another program made it, and mangled the node's name
	}
	if udevMakesNodes() {
		waitUntil(ctx, func() bool { return leadsTo(path, info.Dev) })
	}
	if leadsTo(path, info.Dev) {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("wait for %s: %w", path, err)
	}
	// What is left of another device of that name is in the way.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return makeNode(path, 0o600|unix.S_IFBLK, info.Dev)
}

// removeNode takes the node of a removed device away, unless udev does, and
// unless it leads to another device by now.
func removeNode(ctx context.Context, info Info) error {
	path := Path(info.Name)
	ours := func() bool {
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return false
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			target, err := os.Readlink(path)
			return err == nil && filepath.Base(target) == fmt.Sprintf("dm-%d", info.Minor())
		}
		return st.Rdev == info.Dev
	}
	if udevMakesNodes() {
		waitUntil(ctx, func() bool { return !ours() })
	}
	// The number may have gone to a new device of that name meanwhile.
	if _, err := Stat(info.Name); err == nil || !ours() {
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the node of a removed device: %w", err)
	}
	return nil
}

func waitUntil(ctx context.Context, done func() bool) {
	ctx, cancel := context.WithTimeout(ctx, udevWait)
	defer cancel()
	for !done() && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func makeNode(path string, mode uint32, dev uint64) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make folder of device nodes: %w", err)
	}
	if err := unix.Mknod(path, mode, int(dev)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make device node %s: %w", path, err)
	}
	return nil
}
