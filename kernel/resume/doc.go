// SPDX-License-Identifier: BSD-2-Clause

// Package resume ends a tracker so that its history can go on, and begins one
// that takes it up: the steps of `track stop --save` and `track start` in
// docs/reboots.md.
//
// It promises that a history goes on only if nothing was written to the device
// while no tracker watched it, as far as package fingerprint can prove, and that
// a saved state is used at most once, wherever this process is killed. It knows
// nothing of repositories.
package resume
