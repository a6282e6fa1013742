// SPDX-License-Identifier: BSD-2-Clause

package local

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// dir is an open directory. Paths are relative to it; "." is itself.
type dir struct {
	f *os.File
	// group says that the group may read and write, which restic takes from
	// the config file's mode.
	group bool
}

func openRoot(path string) (*dir, error) {
	f, err := os.OpenFile(path, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	d := &dir{f: f}
	var st unix.Stat_t
	if unix.Fstatat(d.fd(), "config", &st, 0) == nil {
		d.group = st.Mode&0o040 != 0
	}
	return d, nil
}

func (d *dir) fd() int      { return int(d.f.Fd()) }
func (d *dir) close() error { return d.f.Close() }

func (d *dir) fileMode() os.FileMode {
	if d.group {
		return 0o660
	}
	return 0o600
}

func (d *dir) dirMode() os.FileMode {
	if d.group {
		return 0o770
	}
	return 0o700
}

// gone reports whether the directory has been removed while it was open.
func (d *dir) gone() bool {
	var st unix.Stat_t
	return unix.Fstat(d.fd(), &st) == nil && st.Nlink == 0
}

func (d *dir) open(path string, flags int, mode os.FileMode) (*os.File, error) {
	var fd int
	err := uninterrupted(func() (err error) {
		fd, err = unix.Openat(d.fd(), path, flags|unix.O_CLOEXEC, uint32(mode))
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(d.f.Name(), path)), nil
}

func (d *dir) create(path string) (*os.File, error) {
	return d.open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, d.fileMode())
}

func (d *dir) openFile(path string) (*os.File, error) { return d.open(path, unix.O_RDONLY, 0) }

// mkdir makes a folder; one that is there already is no error.
func (d *dir) mkdir(path string) error {
	err := uninterrupted(func() error { return unix.Mkdirat(d.fd(), path, uint32(d.dirMode())) })
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func (d *dir) rename(from, to string) error {
	return uninterrupted(func() error { return unix.Renameat(d.fd(), from, d.fd(), to) })
}

// renameNew renames, or fails with EEXIST if there is a file to already.
func (d *dir) renameNew(from, to string) error {
	err := uninterrupted(func() error {
		return unix.Renameat2(d.fd(), from, d.fd(), to, unix.RENAME_NOREPLACE)
	})
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	// NFS does not know the flag. A hard link has the same effect.
	if err := uninterrupted(func() error { return unix.Linkat(d.fd(), from, d.fd(), to, 0) }); err != nil {
		return err
	}
	return d.remove(from)
}

func (d *dir) remove(path string) error {
	return uninterrupted(func() error { return unix.Unlinkat(d.fd(), path, 0) })
}

// fsType is the kind of file system, 0 if that is not known.
func (d *dir) fsType() uint32 {
	var st unix.Statfs_t
	if err := uninterrupted(func() error { return unix.Fstatfs(d.fd(), &st) }); err != nil {
		return 0
	}
	return uint32(st.Type)
}

// stat reports a file's size in bytes and whether it is a regular file.
func (d *dir) stat(path string) (size int64, regular bool, err error) {
	var st unix.Stat_t
	err = uninterrupted(func() error { return unix.Fstatat(d.fd(), path, &st, 0) })
	return st.Size, st.Mode&unix.S_IFMT == unix.S_IFREG, err
}

// names lists a folder; one that is not there is empty.
func (d *dir) names(path string) ([]string, error) {
	f, err := d.open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// sync makes a folder's entries durable.
func (d *dir) sync(path string) error {
	f, err := d.open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return syncFolder(f)
}

// syncFolder lets pass what network file systems answer that have no such
// call: their server orders the entries.
func syncFolder(f *os.File) error {
	err := f.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}

// mkdirAll makes a directory and those above it, and syncs the parent of each
// that it made.
func mkdirAll(path string) error {
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	parent := filepath.Dir(path)
	if errors.Is(err, os.ErrNotExist) && parent != path {
		if err := mkdirAll(parent); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o700)
	}
	if err != nil {
		return err
	}
	f, err := os.Open(parent)
	if err != nil {
		return err
	}
	defer f.Close()
	return syncFolder(f)
}

func uninterrupted(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
