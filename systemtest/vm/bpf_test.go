// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"testing"
	"time"
)

// The eBPF tracker's own tests with device-mapper devices of each kind and LVM, and
// on virtio disks; all of them on the first kernel, and what depends on the kernel most
// on each.
func TestBPFTracker(t *testing.T) {
	Each(t, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{
			Memory: 2048,
			Modules: []string{
				"loop", "dm-mod", "dm-snapshot", "dm-delay", "dm-crypt", "dm-thin-pool", "dm-flakey", "dm-mirror", "raid0", "xts", "ecb",
			},
			Loadable: []string{"xfs"},
			Tools:    []string{"lvm", "losetup", "mkfs.ext4", "mkfs.xfs", "mount", "umount", "fsfreeze"},
			Disks: []Disk{
				{Name: "first", Size: 1100 << 20, Cache: "unsafe"},
				{Name: "second", Size: 1100 << 20, Cache: "unsafe"},
			},
			Scratch: 2048,
		})
		run := mappedTests
		if k.Name != table[0] && !soak() {
			run = mappedShort
		}
		m.GoTest("./kernel/bpf", Tests{
			Run: run, Timeout: 40 * time.Minute,
			Env: []string{"DSYNC_TEST_DISKS=/dev/vda /dev/vdb"},
		})
	})
}

const mappedShort = "MappedProgramsLoad|MappedMarksEveryKindOfWrite|MappedBitmapEquals|NoChangeOfVirtioDisk"
