// SPDX-License-Identifier: BSD-2-Clause

// Package bpf tracks written blocks with eBPF programs on the block layer's
// raw tracepoints, on a stock kernel with BTF, without a module and without a
// change of the device stack.
//
// It promises [kernel.Tracker] for whole disks, partitions and loop devices
// whose driver takes requests (blk-mq). Everything is pinned under
// /sys/fs/bpf/dsync, so that tracking outlives the process that started it;
// it ends with Stop or with the machine. What it cannot see it refuses, and
// what it may have missed it says: see docs/tracking.md for the proof.
//
// It knows nothing of the epoch log or of repositories.
package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang -target bpfel -cflags "-O2 -g -Wall -Werror -mcpu=v3" object dsync.bpf.c
