// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"regexp"
	"testing"
	"time"
)

// The eBPF tracker's tests on loop devices, partitions and file systems, which any
// machine can run, pass on these kernels too: by default those of what depends on the
// kernel most, on the second, where each operation is known. The rest is run on the
// host's kernel anyway.
func TestBPFTrackerOnLoopDevices(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{
			Memory: 1536, Modules: []string{"loop", "zram", "lzo-rle", "xfs", "btrfs"}, Scratch: 2048,
			Tools: []string{"losetup", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mount", "umount", "fsfreeze", "fallocate"},
			Allow: []Allow{{
				regexp.MustCompile(`WARNING: .* (bpf_bprintf_prepare|bpf_trace_printk|try_get_fmt_tmp_buf|bpf_try_get_buffers)\+`),
				"TestThreeCopiesSeeWhatInterruptsTwo nests programs that print deeper than the kernel has buffers for",
			}},
		})
		skips := map[string]string{}
		if k.Name == "6.1" {
			skips["TestMergedDiscardsAreMarked"] = "discards by io_uring came with 6.12"
			skips["TestThreeCopiesSeeWhatInterruptsTwo"] = "a print within a print stops 6.1"
		}
		run := loopShort
		if soak() {
			run = ""
		}
		m.GoTest("./kernel/bpf", Tests{
			Run: run, Timeout: 30 * time.Minute,
			// The others need device-mapper; TestBPFTracker runs them.
			Args:  []string{"-test.skip=" + mappedTests},
			Env:   []string{"DSYNC_TEST_EMULATED=1"},
			Skips: skips,
		})
	})
}

const loopShort = "NoChangeIsMissed|BitmapEquals|MergedDiscards|WriteInFlight|EachTracepointAlone|KilledAnywhere|Partition|ThreeCopies"

const mappedTests = "Mapped|Virtio|FailedWrite|^TestTable|TargetsThatItDoesNotKnow|LogicalVolume"
