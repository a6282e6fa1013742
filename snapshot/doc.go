// SPDX-License-Identifier: BSD-2-Clause

// Package snapshot makes and finds device snapshots: restic snapshots whose
// tree holds a device.json and the layers that give the device's content
// (docs/format.md).
//
// It promises that a snapshot it saves is complete by itself, that every block
// which differs from the parent's image is in a new layer (as far as the
// source of changes says so, and it never guesses), and that nothing refers to
// data before the data are durable. It knows nothing of the command line, and
// of how a device is written to.
package snapshot
