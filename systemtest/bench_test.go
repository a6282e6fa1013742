// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// cost is what a command took: seconds, seconds of processor time, and MiB that it had resident at
// most.
type cost struct{ wall, cpu, rss float64 }

// cost runs the command, which must succeed.
func (e *env) cost(args ...string) cost {
	e.t.Helper()
	cmd := e.prepare("/proc/self/exe", append([]string{measureArg, dsync}, args...)...)
	began := time.Now()
	r := finish(e.t, cmd)
	took := time.Since(began).Seconds()
	kib, err := strconv.ParseFloat(strings.TrimSpace(r.stdout), 64)
	if r.code != 0 || err != nil {
		e.t.Fatalf("%v: %+v: %v", args, r, err)
	}
	return cost{took, (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), kib / 1024}
}

// measureArg makes the test binary run a command and say, in KiB, how much memory it had resident
// at most. The kernel counts as a process's peak also what the one that started it had, and this
// binary has little as long as it does nothing else.
const measureArg = "run-and-measure"

func measureMain(args []string) int {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return 1
	}
	fmt.Println(usage.Maxrss)
	return 0
}

// measured runs the command and reports its cost.
func (e *env) measured(b *testing.B, bytes int64, args ...string) {
	b.Helper()
	b.SetBytes(bytes)
	b.ResetTimer()
	c := e.cost(args...)
	b.StopTimer()
	b.ReportMetric(c.rss, "MiB-RSS")
	b.ReportMetric(c.cpu, "CPU-s")
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
