// SPDX-License-Identifier: BSD-2-Clause

// Package cow keeps what a device that the kernel module tracks held at one
// instant, in a dm-snapshot, while the device goes on (docs/points-in-time.md).
//
// It promises that the mapped device is what it was before when Drop or Clean
// has returned, and that it can be used at every instant in between, but for
// the suspension from Suspend to Resume, which the watchdog of package freeze
// ends if this process dies. It knows nothing of file systems: whoever wants
// them at rest freezes them before Suspend.
//
// The tables, top to bottom, and what changes:
//
//	NAME         dsync on DEVICE           dsync on NAME-origin
//	NAME-origin                            snapshot-origin on DEVICE
//	NAME-cow                               snapshot of DEVICE, into the space
//	DEVICE
package cow
