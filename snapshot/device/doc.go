// SPDX-License-Identifier: BSD-2-Clause

// Package device reads one block device or plain image file, says what it is,
// and says who uses it: the file systems, swap and devices stacked above it,
// in every mount namespace.
//
// It promises reads that bypass the page cache of a block device, so that they
// cannot return what a mounted file system has since replaced, and it errs
// towards "in use": a device that somebody claims for an unknown purpose is
// reported as claimed. It runs no external command. It knows nothing of
// snapshots or repositories, and it never writes to a device.
package device
