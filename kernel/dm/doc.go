// SPDX-License-Identifier: BSD-2-Clause

// Package dm tracks written blocks with the kernel module dm-dsync (folder
// kernel/module): a device-mapper target that maps a device one to one and
// marks each block that is written through it.
//
// A device is tracked by using /dev/mapper/NAME in its place, which [Start]
// makes. It promises [kernel.Tracker] for what is written through that; the
// device beneath is claimed, so that it cannot be mounted or built upon, but
// a program that opens it for writing all the same writes past the tracker.
// Tracking outlives the process that started it; it ends with Stop or with
// the machine. docs/tracking.md says why no write is missed.
//
// It knows nothing of the epoch log or of repositories.
package dm
