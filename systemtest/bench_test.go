// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"math/rand/v2"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// measured runs the command and reports the most memory that it had resident.
// The kernel counts what the process had before it became the command, too:
// that is this test's, which is why it keeps small.
func (e *env) measured(b *testing.B, bytes int64, args ...string) {
	b.Helper()
	cmd := e.command(args...)
	b.SetBytes(bytes)
	b.ResetTimer()
	r := finish(b, cmd)
	b.StopTimer()
	if r.code != 0 {
		b.Fatalf("%v: %+v", args, r)
	}
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		b.Fatal(err)
	}
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		b.Fatal("the system says nothing of the process's memory")
	}
	b.ReportMetric(float64(usage.Maxrss)/1024, "MiB-RSS")
	b.ReportMetric(float64(own.Maxrss)/1024, "MiB-RSS-of-test")
	b.ReportMetric(cmd.ProcessState.UserTime().Seconds()+cmd.ProcessState.SystemTime().Seconds(), "CPU-s")
}

// BenchmarkDevice measures a full backup of a device of 8 GiB with data that
// compress 2:1, a tracked one of 1 % random blocks, one that compares, and a
// restore. Each runs once: run it with -benchtime 1x.
func BenchmarkDevice(b *testing.B) {
	const size = 8 << 30
	r := rand.New(rand.NewPCG(1, 0))
	c := newContent(r, true)
	e, d := lightEnv(b), newDisk(b, size)
	f := direct(b, d.path)
	fillRange(b, f, c, 0, size)
	d.track(e)
	b.Run("Full", func(b *testing.B) { e.measured(b, size, "-q", "backup", d.path, "--changes", "full") })
	const blocks = size / kernel.BlockSize / 100
	for some := range slices.Chunk(someBlocks(r, size, blocks), 1024) {
		writeBlocks(b, f, c, some)
	}
	b.Run("Incremental", func(b *testing.B) {
		e.measured(b, blocks*kernel.BlockSize, "-q", "backup", d.path, "--changes", "tracker")
	})
	b.Run("Compare", func(b *testing.B) { e.measured(b, size, "-q", "backup", d.path, "--changes", "compare") })
	b.Run("Restore", func(b *testing.B) {
		file := filepath.Join(b.TempDir(), "restored.img")
		e.measured(b, size, "-q", "restore", "latest", file)
		same(b, d.file, file)
	})
}
