// SPDX-License-Identifier: BSD-2-Clause

// Package vm boots Debian's kernels under QEMU and runs scenarios in them: what
// needs modules, device-mapper or LVM, a kernel other than the host's, or a
// power cut.
//
// A scenario is an ordinary test function. [Each] runs it once for each kernel of
// the table; [Start] boots a guest with the modules, programs and disks that its
// [Config] names; [Machine.Run] runs a command in it, [Machine.GoTest] the tests of
// a package of this project. The guest's root file system is in memory and new at each
// boot; its disks last as long as the test. A line in the kernel's log that tells of
// a fault fails the test (see [Faults]).
//
// QEMU emulates in software. Nothing here needs root, or waits for a fixed time.
package vm
