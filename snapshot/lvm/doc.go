// SPDX-License-Identifier: BSD-2-Clause

// Package lvm keeps what a logical volume held at one instant in a snapshot that
// LVM makes of it, while the volume goes on (docs/points-in-time.md).
//
// It promises that no snapshot of its own is left when Drop has returned without
// an error, and that those of processes that died are removed by the next New for
// the same volume. It never touches a snapshot of somebody else: ours have the tag
// and the beginning of the name that say so. All changes are made by LVM's own
// commands, none of which is interrupted. It knows nothing of trackers: whoever
// wants to look at the volume's tables around each change of them gives Options.Look.
package lvm
