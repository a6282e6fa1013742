// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"os"
	"testing"
	"time"
)

// The kernel module keeps what its documentation promises.
func TestKernelModule(t *testing.T) {
	Each(t, func(t *testing.T, k Kernel) {
		const file = "/root/dm-dsync.ko"
		module := dsyncModule(t, k)
		m := Start(t, k, Config{
			Memory:  2048,
			Modules: []string{"loop", "dm-mod", "dm-zero", "dm-delay", "dm-flakey", module},
			Files:   map[string]string{file: module},
			Disks:   []Disk{{Name: "data", Size: 64 << 20, Cache: "unsafe"}},
		})
		m.GoTest("./kernel/module/moduletest", Tests{
			Run: os.Getenv("DSYNC_TEST_RUN"), Timeout: 30 * time.Minute,
			Env: []string{"DSYNC_TEST_DISK=" + m.Device("data"), "DSYNC_TEST_MODULE=" + file},
		})
	})
}
