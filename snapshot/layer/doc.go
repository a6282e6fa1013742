// SPDX-License-Identifier: BSD-2-Clause

// Package layer writes and reads layers: sorted runs of what one backup found
// changed on a device, in parts of bounded size, each with its block index,
// data and sums (docs/format.md).
//
// It promises that every block handed to a [Write] is read back by a
// [Merger] over the same layers, the newest layer winning block by block; that
// memory does not grow with the device; and that damage is reported before
// anything is handed out. It knows nothing of trackers, of how a point in time
// is made, and of snapshots.
//
// Data flows one way when writing:
//
//	ranges -> reader (parallel, in order) -> splitter (zeros, runs, chunks)
//	       -> workers (hash, compress, encrypt) -> part (index, data, sums)
package layer
