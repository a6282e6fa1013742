// SPDX-License-Identifier: BSD-2-Clause

// Package looptest gives tests real block devices and file systems: loop
// devices on sparse files, partitions, mounts. They go away with the test, and
// with the test process if it is killed: a guard process outlives it, thaws
// what is frozen, unmounts and detaches. It runs as root with util-linux.
package looptest
