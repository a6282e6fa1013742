// SPDX-License-Identifier: BSD-2-Clause

// Package kernel says what the kernel knows about written blocks: trackers,
// epochs, bitmaps, extents and positions.
//
// It promises the superset property (every block that may have changed is in
// the bitmap) for whatever implements [Tracker], and it knows nothing of
// repositories or snapshots.
package kernel
