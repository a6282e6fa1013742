// SPDX-License-Identifier: BSD-2-Clause

// Package freeze holds the file systems above a device still, for a bounded
// time, while a point in time is made of it.
//
// It promises that no file system stays frozen: a watchdog process does the
// freezing, and thaws when it is told to, on the deadline, on SIGTERM, and when
// its parent dies of whatever cause; if the watchdog dies, the parent thaws.
// Only the death of both at one instant leaves a file system frozen (see
// docs/points-in-time.md). It knows nothing of trackers, snapshots or
// repositories; which file systems there are, package device finds out.
//
// A program that uses it calls [WatchdogMain] first thing in main, and in
// TestMain, when [IsWatchdog] says so.
package freeze
