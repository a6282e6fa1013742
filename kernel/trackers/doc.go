// SPDX-License-Identifier: BSD-2-Clause

// Package trackers finds whichever tracker watches a device, and starts the
// kind that suits it: the kernel module's (package dm) or eBPF's (package bpf).
//
// It promises that a device has one tracker at most if all are started by it,
// and that a kind which is not there does not keep the other from being found.
package trackers
