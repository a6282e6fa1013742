// SPDX-License-Identifier: BSD-2-Clause

// Package systemtest runs the built command against real devices, real file
// systems, stock restic in two versions and a real MinIO server. Its tests are
// the promises of the README, one by one.
//
// It needs root, and what tools/install installs. It leaves nothing behind:
// mounts, loop devices and trackers of a test end with the test.
package systemtest
