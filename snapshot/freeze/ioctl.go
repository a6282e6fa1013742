// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"os"

	"golang.org/x/sys/unix"
)

// From linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int), which are
// the same numbers on every architecture.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// freezeFS syncs and freezes the file system that f lies on. EBUSY: somebody
// has frozen it already. EOPNOTSUPP: it cannot be frozen.
func freezeFS(f *os.File) error { return ioctl(f, fiFreeze) }

// thawFS ends a freeze. EINVAL: it is not frozen.
func thawFS(f *os.File) error { return ioctl(f, fiThaw) }

func ioctl(f *os.File, request uintptr) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}
