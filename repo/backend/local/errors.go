// SPDX-License-Identifier: BSD-2-Clause

package local

import (
	"errors"
	"fmt"
	"os"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"golang.org/x/sys/unix"
)

// callerError is what the caller's own fn returned: nothing to explain.
type callerError struct{ err error }

func (e callerError) Error() string { return e.err.Error() }
func (e callerError) Unwrap() error { return e.err }

func consumed(err error) error {
	if err == nil {
		return nil
	}
	return callerError{err}
}

func isCallers(err error) bool { return errors.As(err, new(callerError)) }

func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// unreadable marks an error of the medium in reading: the kernel and the disk
// have repeated the read for as long as they saw sense in it. Over a network the
// same error may be one of the connection (a soft NFS mount, sshfs), which passes.
func unreadable(err error, fsType uint32) error {
	if !errors.Is(err, unix.EIO) {
		return err
	}
	switch fsType {
	case unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC,
		unix.CEPH_SUPER_MAGIC, unix.AFS_FS_MAGIC, unix.V9FS_MAGIC, unix.FUSE_SUPER_MAGIC:
		return err
	}
	return backend.Broken(fmt.Errorf("the disk cannot read it, see the kernel's log: %w", err))
}

// explain drops the path from an error of package os, since the message has
// it already, and marks what cannot be mended by trying again.
func explain(err error) error {
	if isCallers(err) || errors.Is(err, backend.ErrPermanent) {
		return err
	}
	if pe := (*os.PathError)(nil); errors.As(err, &pe) {
		err = pe.Err
	}
	switch {
	case isFull(err):
		return backend.Permanent(fmt.Errorf("the disk is full, make room and try again: %w", err))
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return backend.Permanent(fmt.Errorf("not allowed, check the owner and the mode of the folders: %w", err))
	case errors.Is(err, unix.EROFS):
		return backend.Permanent(fmt.Errorf("the file system is mounted read-only, or an error made it so: %w", err))
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP):
		return backend.Permanent(err)
	}
	return err
}
