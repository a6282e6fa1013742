// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// writers names somebody who has the device, or one that shares sectors with
// it, open for writing: what is written that way passes by the mapped device.
// A claim does not find such a one.
func (d disk) writers() (string, error) {
	relatives, err := d.relatives()
	if err != nil {
		return "", err
	}
	devs := make(map[uint64]bool)
	for _, r := range relatives {
		devs[r.dev] = true
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", fmt.Errorf("list loop devices: %w", err)
	}
	for _, file := range loops {
		backing := attribute(filepath.Dir(file), "backing_file")
		if dev, err := blockDevice(backing); err == nil && devs[dev] {
			return "the loop device " + filepath.Base(filepath.Dir(filepath.Dir(file))), nil
		}
	}
	fds, err := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	if err != nil {
		return "", fmt.Errorf("list open files: %w", err)
	}
	for _, fd := range fds {
		link, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(link, "/") {
			continue // closed since it was listed, or a socket, a pipe
		}
		var st unix.Stat_t
		if unix.Stat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || !devs[st.Rdev] {
			continue
		}
		process := filepath.Dir(filepath.Dir(fd))
		if writable(filepath.Join(process, "fdinfo", filepath.Base(fd))) {
			return fmt.Sprintf("the process %s (%s)", filepath.Base(process), attribute(process, "comm")), nil
		}
	}
	return "", nil
}

// writable reads the flags of an open file from its fdinfo. A file that was
// closed meanwhile is not.
func writable(fdinfo string) bool {
	b, err := os.ReadFile(fdinfo)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(value), 8, 64)
			return err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY
		}
	}
	return true
}
