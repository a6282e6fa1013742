// SPDX-License-Identifier: BSD-2-Clause

// Package retention says which snapshots a policy keeps.
//
// It promises what restic's forget does with the same policy, groups and
// snapshots, restic's own among them: the same are kept, for the same reasons.
// Where restic leaves open what becomes of snapshots with the very same time,
// the one with the lower ID counts as the newer. It reads and removes nothing,
// and knows nothing of what a snapshot holds (docs/retention.md).
package retention
