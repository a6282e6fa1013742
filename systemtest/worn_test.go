// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkWornChain restores the newest snapshot of a device of 1 GiB that was backed up
// each hour for five days under the load of TestYearsOfBackups, with forget and prune each
// day, and, in turns, a fresh full backup of the same content; caches are dropped before
// each. It reports the times, and the median of five ratios, and fails if that is above 1.6.
// Run it with -benchtime 1x.
func BenchmarkWornChain(b *testing.B) {
	y := newYears(lightEnv(b), int64(count(2<<10, 1<<10))<<20)
	y.back()
	hours := count(1000, 120)
	for h := 1; h <= hours; h++ {
		y.back()
		if h%24 == 0 {
			y.retain(true)
		}
	}
	fresh := lightEnv(b)
	fresh.backup(y.disk.path)
	target := filepath.Join(b.TempDir(), "restored")
	restore := func(e *env) float64 {
		if err := os.RemoveAll(target); err != nil {
			b.Fatal(err)
		}
		run(b, "sync")
		dropCaches(b)
		began := time.Now()
		e.must("-q", "restore", "latest", target)
		took := time.Since(began).Seconds()
		run(b, "cmp", y.disk.path, target)
		return took
	}
	var ratios, worn, full []float64
	for range 5 {
		w, f := restore(y.env), restore(fresh)
		worn, full, ratios = append(worn, w), append(full, f), append(ratios, w/f)
	}
	b.Logf("worn %.2f s, fresh %.2f s, ratios %.2f, %d layers at most", worn, full, ratios, y.layers)
	b.ReportMetric(median(worn), "s-worn")
	b.ReportMetric(median(full), "s-fresh")
	b.ReportMetric(median(ratios), "ratio")
	b.ReportMetric(0, "ns/op")
	if ratio := median(ratios); ratio > 1.6 {
		b.Errorf("restoring the worn chain takes %.2f times what restoring a full backup takes, at most 1.6 is allowed", ratio)
	}
}
