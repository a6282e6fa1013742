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
// the median of pairs of runs. The disk is a virtio disk; null is a device that
// does nothing, so that all that is left is what the processor does.
func BenchmarkModule(b *testing.B) {
	eachKernel(b, func(b *testing.B, k Kernel) {
		const size = 256 << 20
		m := Start(b, k, Config{
			Memory: 2048, Tools: []string{"fio", "dmsetup"}, Timeout: 5 * time.Minute,
			Modules: []string{"dm-mod", "null_blk nr_devices=1 gb=1 queue_mode=2 irqmode=0", dsyncModule(b, k)},
			Disks:   []Disk{{Name: "data", Size: size, Cache: "unsafe"}},
		})
		for _, below := range []struct{ name, device string }{{"disk", m.Device("data")}, {"null", "/dev/nullb0"}} {
			for _, target := range []string{"linear", "dsync"} {
				m.Run("env", "DM_DISABLE_UDEV=1", "dmsetup", "create", below.name+"-"+target, "--table", fmt.Sprintf("0 %d %s %s 0", size/512, target, below.device))
				// The disk's file gets its blocks, and the bitmap its bits.
				m.Run("dd", "if=/dev/zero", "of=/dev/mapper/"+below.name+"-"+target, "bs=1M", fmt.Sprintf("count=%d", size>>20), "oflag=direct")
			}
		}
		pairs := 5
		if soak() {
			pairs = 25
		}
		for b.Loop() {
			for _, below := range []string{"disk", "null"} {
				for _, rw := range []string{"randwrite", "write"} {
					var ratios []float64
					for i := range pairs {
						rate := map[string]float64{}
						targets := []string{"linear", "dsync"}
						if i%2 == 1 {
							slices.Reverse(targets)
						}
						for _, target := range targets {
							rate[target] = fio(b, m, below+"-"+target, rw)
						}
						ratios = append(ratios, rate["dsync"]/rate["linear"])
					}
					slices.Sort(ratios)
					b.Logf("%s %s: %.3f", below, rw, ratios)
					b.ReportMetric(ratios[len(ratios)/2], below+"-"+rw+"-ratio")
				}
			}
		}
	})
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
