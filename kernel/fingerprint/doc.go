// SPDX-License-Identifier: BSD-2-Clause

// Package fingerprint proves that nobody wrote to a device while it was not
// tracked, so that a tracker's history can go on after a reboot.
//
// It promises that a fingerprint which claims to prove something changes
// whenever a file system on the device is mounted for writing, checked, repaired
// or resized, and when a partition table or anything else that belongs to no
// file system changes. What it cannot prove it says: a device with a part that
// no witness is known for starts a new history. docs/reboots.md gives the
// reasons, and what stays unseen. It knows nothing of how blocks are tracked,
// and nothing of repositories.
package fingerprint
