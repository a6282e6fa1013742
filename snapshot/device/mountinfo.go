// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountEntry is one line of a mountinfo file (proc_pid_mountinfo(5)).
type mountEntry struct {
	id        uint64 // unique among all mounts of the moment
	num       Number // of the superblock: st_dev but for btrfs subvolumes
	root      string // within the file system
	point     string // relative to the root of the process it was read from
	fsType    string
	source    string
	readOnly  bool   // the superblock, whatever the mount's own flags say
	options   string // of the superblock
	processID string // whose /proc/<id>/root the mount point is relative to
}

func parseMountinfo(r io.Reader, processID string) ([]mountEntry, error) {
	var out []mountEntry
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		e, err := parseMountLine(sc.Text())
		if err != nil {
			return nil, err
		}
		e.processID = processID
		out = append(out, e)
	}
	return out, sc.Err()
}

// parseMountLine reads "36 35 98:0 /root /point opts [optional…] - type source superopts".
func parseMountLine(line string) (e mountEntry, err error) {
	left, right, ok := strings.Cut(line, " - ")
	l, r := strings.Split(left, " "), strings.Split(right, " ")
	if !ok || len(l) < 6 || len(r) < 3 {
		return e, fmt.Errorf("parse mountinfo line %q: too few fields", line)
	}
	if e.id, err = strconv.ParseUint(l[0], 10, 64); err != nil {
		return e, fmt.Errorf("parse mountinfo line %q: %w", line, err)
	}
	if e.num, err = ParseNumber(l[2]); err != nil {
		return e, fmt.Errorf("parse mountinfo line %q: %w", line, err)
	}
	e.root, e.point = unescape(l[3]), unescape(l[4])
	e.fsType, e.source, e.options = unescape(r[0]), unescape(r[1]), r[2]
	flag, _, _ := strings.Cut(e.options, ",")
	e.readOnly = flag == "ro"
	return e, nil
}

// unescape undoes the kernel's \ooo for blanks, tabs, newlines and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// allMounts lists the mounts of every mount namespace that has a process, our
// own first. A process whose root was changed sees only what lies below its
// root, so each pair of namespace and root is read once.
func (s system) allMounts() ([]mountEntry, error) {
	entries, err := os.ReadDir(s.proc)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	ids := []string{"self"}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			ids = append(ids, e.Name())
		}
	}
	seen := make(map[string]bool)
	var out []mountEntry
	for _, id := range ids {
		mounts, err := s.mountsOf(id, seen)
		if err != nil && !passable(id, err) {
			return nil, fmt.Errorf("read mounts of process %s: %w", id, err)
		}
		out = append(out, mounts...)
	}
	return out, nil
}

// passable reports an error that a process explains which has just ended, or
// which we may not look at (in a container, say, even root may not look at all
// processes). A file system that is mounted only there still claims its device,
// and so shows in [Use].Claimed.
func passable(id string, err error) bool {
	if id == "self" {
		return false
	}
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) ||
		errors.Is(err, fs.ErrPermission)
}

func (s system) mountsOf(id string, seen map[string]bool) ([]mountEntry, error) {
	dir := filepath.Join(s.proc, id)
	ns, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
	if err != nil {
		return nil, err
	}
	root, err := os.Readlink(filepath.Join(dir, "root"))
	if err != nil {
		return nil, err
	}
	key := ns + " " + root
	if seen[key] {
		return nil, nil
	}
	f, err := os.Open(filepath.Join(dir, "mountinfo"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out, err := parseMountinfo(f, id)
	if err != nil {
		return nil, err
	}
	seen[key] = true
	return out, nil
}

// via is a path that leads to the mount point from our own namespace.
func (e mountEntry) via(proc string) string {
	if e.processID == "self" {
		return e.point
	}
	return filepath.Join(proc, e.processID, "root", e.point)
}

// openMount opens the root of a mount, a directory or plain file, and makes
// sure that the path still leads to it: another mount may cover it.
func openMount(path string, id uint64) (*os.File, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE, &st); err != nil {
		return nil, fmt.Errorf("look at mount %s: %w", path, err)
	}
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFDIR && t != unix.S_IFREG {
		return nil, fmt.Errorf("look at mount %s: neither a directory nor a plain file", path)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open mount: %w", err)
	}
	got, err := mountID(int(f.Fd()), "", unix.AT_EMPTY_PATH)
	if err == nil && got != id {
		err = errors.New("another mount covers it")
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open mount %s: %w", path, err)
	}
	return f, nil
}

// mountID is the mount that a path lies on, as in the first field of mountinfo.
func mountID(dirfd int, path string, flags int) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(dirfd, path, flags, unix.STATX_MNT_ID, &st); err != nil {
		return 0, fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return 0, fmt.Errorf("look at %s: the kernel names no mount (Linux 5.8 does)", path)
	}
	return st.Mnt_id, nil
}
