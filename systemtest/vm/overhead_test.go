// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// eachKernel is Each for benchmarks.
func eachKernel(b *testing.B, bench func(b *testing.B, k Kernel)) {
	b.Helper()
	for _, name := range table {
		b.Run(name, func(b *testing.B) {
			k, err := Get(name)
			if err != nil {
				b.Fatal(err)
			}
			bench(b, k)
		})
	}
}

// BenchmarkModule has fio write through dm-linear and through dm-dsync in turns, in one
// guest, and reports the writes a second of the second as a part of those of the first:
// the median of pairs of runs.
//
// "null" is a device that does nothing, so that all that is left is what the processor
// does, on a guest whose clock counts instructions: the ratio is that of all
// instructions that a write takes, from fio's loop to the completion, and hardly differs from run
// to run. "disk" is a virtio disk on an emulated machine, as noisy as the host is.
func BenchmarkModule(b *testing.B) {
	const size = 256 << 20
	eachKernel(b, func(b *testing.B, k Kernel) {
		for b.Loop() {
			m := Start(b, k, Config{
				Memory: 1024, Counted: true, Tools: []string{"fio", "dmsetup"}, Timeout: 10 * time.Minute,
				Modules: []string{"dm-mod", "null_blk nr_devices=1 gb=1 queue_mode=2 irqmode=0", dsyncModule(b, k)},
			})
			overhead(b, m, "null", "/dev/nullb0", size, 3)
			m.PowerOff()
			m = Start(b, k, Config{
				Memory: 2048, Tools: []string{"fio", "dmsetup"}, Timeout: 5 * time.Minute,
				Modules: []string{"dm-mod", dsyncModule(b, k)}, Disks: []Disk{{Name: "data", Size: size, Cache: "unsafe"}},
			})
			pairs := 15
			if soak() {
				pairs = 50
			}
			overhead(b, m, "disk", m.Device("data"), size, pairs)
			m.PowerOff()
		}
	})
}

// overhead reports the ratios on one device.
func overhead(b *testing.B, m *Machine, name, below string, size int64, pairs int) {
	b.Helper()
	targets := []string{"linear", "dsync"}
	for _, target := range targets {
		m.Run("env", "DM_DISABLE_UDEV=1", "dmsetup", "create", name+"-"+target, "--table", fmt.Sprintf("0 %d %s %s 0", size/512, target, below))
		// The disk's file gets its blocks, and the bitmap its bits.
		m.Run("dd", "if=/dev/zero", "of=/dev/mapper/"+name+"-"+target, "bs=1M", fmt.Sprintf("count=%d", size>>20), "oflag=direct")
	}
	for _, rw := range []string{"randwrite", "write"} {
		var ratios []float64
		rate := map[string]float64{}
		for range pairs {
			for _, target := range targets {
				rate[target] = fio(b, m, name+"-"+target, rw)
			}
			slices.Reverse(targets)
			ratios = append(ratios, rate["dsync"]/rate["linear"])
		}
		slices.Sort(ratios)
		b.Logf("%s %s: %.4f; at last %.0f and %.0f writes a second", name, rw, ratios, rate["linear"], rate["dsync"])
		b.ReportMetric(ratios[len(ratios)/2], name+"-"+rw+"-ratio")
	}
}

// fio returns the writes a second.
func fio(b *testing.B, m *Machine, device, rw string) float64 {
	b.Helper()
	out := m.Run("fio", "--name=x", "--filename=/dev/mapper/"+device, "--rw="+rw, "--bs=4k", "--direct=1", "--ioengine=libaio",
		"--iodepth=16", "--time_based", "--runtime=2", "--ramp_time=0.5", "--randrepeat=0", "--norandommap", "--output-format=json")
	var report struct {
		Jobs []struct{ Write struct{ IOPS float64 } }
	}
	if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &report); err != nil || len(report.Jobs) != 1 || report.Jobs[0].Write.IOPS == 0 {
		b.Fatalf("fio: %v: %s", err, out)
	}
	return report.Jobs[0].Write.IOPS
}

// BenchmarkFourTebibytes makes a device of 4 TiB, as the command dmsetup does, and
// reports how long that takes and what its two bitmaps hold of memory.
func BenchmarkFourTebibytes(b *testing.B) {
	eachKernel(b, func(b *testing.B, k Kernel) {
		const sectors = 4 << 31
		m := Start(b, k, Config{Memory: 2048, Tools: []string{"dmsetup"}, Modules: []string{"dm-mod", "dm-zero", dsyncModule(b, k)}})
		m.Run("env", "DM_DISABLE_UDEV=1", "dmsetup", "create", "zero", "--table", fmt.Sprintf("0 %d zero", sectors))
		create := func() {
			m.Run("env", "DM_DISABLE_UDEV=1", "dmsetup", "create", "huge", "--table", fmt.Sprintf("0 %d dsync /dev/mapper/zero 0", sectors))
		}
		create() // the first time, QEMU gets its memory
		bytes := 0.0
		for _, size := range strings.Fields(m.Shell("sed -n '/[[]dm_dsync[]]/s/^[^ ]* *\\([0-9]*\\) .*/\\1/p' /proc/vmallocinfo")) {
			var n float64
			if _, err := fmt.Sscan(size, &n); err != nil {
				b.Fatal(err)
			}
			bytes = max(bytes, n-4096) // with a page that guards it
		}
		m.Run("env", "DM_DISABLE_UDEV=1", "dmsetup", "remove", "huge")
		var took time.Duration
		n := 0
		for b.Loop() {
			start := time.Now()
			create()
			took += time.Since(start)
			m.Run("env", "DM_DISABLE_UDEV=1", "dmsetup", "remove", "huge")
			n++
		}
		b.ReportMetric(took.Seconds()/float64(n), "s/create")
		b.ReportMetric(bytes/(1<<20), "MiB/bitmap")
		b.ReportMetric(0, "ns/op")
	})
}
