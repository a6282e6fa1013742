// SPDX-License-Identifier: BSD-2-Clause

// Package devmapper makes, changes, asks and removes device-mapper devices
// through the ioctls of /dev/mapper/control, without libdevmapper and without
// the dmsetup program.
//
// The structures and numbers are those of the kernel's linux/dm-ioctl.h, as
// golang.org/x/sys/unix has them (DmIoctl, DmTargetSpec, DM_…), interface
// version 4. They have the same layout on 32 and 64 bits: every 64-bit field
// lies on a multiple of 8 bytes, and the header is 312 bytes long (0x138, which
// the ioctl numbers contain).
//
// A device is named by its name in all functions but [Find]. It promises that an
// error which the kernel gave can be tested with errors.Is against unix.EBUSY,
// unix.ENXIO and so on, and says what was to be done to which device; that
// names need no mangling (see [CheckName]); and that the node /dev/mapper/NAME is
// there when [Resume] has returned, whether udev runs or not.
// What udev's rules do after the node is made is not waited for.
//
// It knows nothing of any target: parameters are strings.
package devmapper
