// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bufio"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// BenchmarkCompare measures compare scans of a device of 8 GiB (DSYNC_BENCH_GIB) that
// was overwritten at random for 20 backups, and of which 1 % changed while nothing
// tracked it: against the speed at which the device can be read, and that of the
// hash on all cores, and against stock restic on the same file, in the same run. Run it
// with -benchtime 1x.
//
// The device reads its file past the page cache, so that its speed is the disk's, taken
// before and after each scan; "memory" is the same with a file that the page cache has,
// where reading takes the processor too. "scan" is the speed at which a backup reads, while
// it stores what differs; "compare" is that of the whole command, with opening the repository.
// Ratios are medians of three.
func BenchmarkCompare(b *testing.B) {
	size := int64(8) << 30
	if v := os.Getenv("DSYNC_BENCH_GIB"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		size = n << 30
	}
	r := rand.New(rand.NewPCG(2, 0))
	c := newContent(r, true)
	e, d := lightEnv(b), newDisk(b, size)
	f := direct(b, d.path)
	fillRange(b, f, c, 0, size)
	d.track(e)
	e.backup(d.path)
	blocks := int(size / kernel.BlockSize)
	for range count(200, 20) {
		writeBlocks(b, f, c, someBlocks(r, size, blocks/500))
		e.backup(d.path)
	}
	e.must("track", "stop", d.path)
	stock := newEnv(b, b.TempDir())
	stock.restic("0.18", "init")
	stock.restic("0.18", "backup", d.file)

	rate := func(took time.Duration) float64 { return float64(size) / 1e6 / took.Seconds() }
	hash := rate(hashAll(c, size))
	b.ReportMetric(hash, "hash-MB/s")
	var restic float64
	measure := func(name string, cold bool) (ours float64) {
		var all, scans, ratios, disks []float64
		for i := range 3 {
			writeBlocks(b, f, c, someBlocks(r, size, blocks/100))
			run(b, "sync", d.file)
			before := readDevice(b, d.path, size)
			s, took, scan := e.scan(d.path)
			ours := rate(took)
			disk := rate((before + readDevice(b, d.path, size)) / 2)
			if s.BytesRead != size || s.DataAdded > int64(blocks/100*kernel.BlockSize)*11/10 {
				b.Errorf("%+v", s)
			}
			all, scans, disks = append(all, ours), append(scans, scan), append(disks, disk)
			ratios = append(ratios, scan/min(disk, hash))
			if cold && i == 0 { // as much has changed since its backup as since ours
				dropCaches(b)
				began := time.Now()
				stock.restic("0.18", "backup", d.file)
				restic = rate(time.Since(began))
				b.ReportMetric(restic, "restic-MB/s")
				b.ReportMetric(ours/restic, "times-restic")
			}
		}
		b.Logf("%s: compare %.0f, scan %.0f, %s %.0f MB/s, of the least %.3f", name, all, scans, name, disks, ratios)
		b.ReportMetric(median(scans), "scan-"+name+"-MB/s")
		b.ReportMetric(median(disks), name+"-MB/s")
		b.ReportMetric(median(all), "compare-"+name+"-MB/s")
		b.ReportMetric(median(ratios), "of-the-least-"+name)
		return median(all)
	}
	run(b, "losetup", "--direct-io=on", d.path)
	measure("disk", true)
	run(b, "losetup", "--direct-io=off", d.path)
	readDevice(b, d.path, size)
	measure("memory", false)
	b.ReportMetric(0, "ns/op")
}

func dropCaches(b *testing.B) {
	b.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		b.Fatal(err)
	}
}

// scan backs a device up, and returns how long that took, and how many MB a second were
// read between the first time it told its progress and the last.
func (e *env) scan(device string) (sum snapshot.Summary, took time.Duration, rate float64) {
	e.t.Helper()
	cmd := e.command("backup", "--json", device)
	out, err := cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	type told struct {
		at    time.Time
		bytes int64
	}
	var seen []told
	var line string
	for s := bufio.NewScanner(out); s.Scan(); {
		line = s.Text()
		var status struct {
			Phase string `json:"phase"`
			Bytes int64  `json:"bytes_done"`
		}
		if json.Unmarshal([]byte(line), &status) == nil && status.Phase == "reading" {
			seen = append(seen, told{time.Now(), status.Bytes})
		}
	}
	if err := cmd.Wait(); err != nil {
		e.t.Fatal(err)
	}
	took = time.Since(began)
	if len(seen) < 2 {
		e.t.Fatalf("the scan was over before it told its progress twice: it takes a larger device")
	}
	first, last := seen[0], seen[len(seen)-1]
	return summary(e.t, line), took, float64(last.bytes-first.bytes) / 1e6 / last.at.Sub(first.at).Seconds()
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// readDevice reads a device as fast as it goes.
func readDevice(b *testing.B, path string, size int64) time.Duration {
	b.Helper()
	dev, err := device.Open(path, device.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	const piece = 1 << 20
	began := time.Now()
	var next atomic.Int64
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			buf := device.AlignedBuffer(piece)
			for off := next.Add(piece) - piece; off < size; off = next.Add(piece) - piece {
				if err := dev.ReadExtent(context.Background(), buf, off); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	return time.Since(began)
}

// hashAll hashes as many bytes from memory, on all cores.
func hashAll(c *content, size int64) time.Duration {
	key := blocksum.Key{1}
	buf := make([]byte, 1<<20)
	c.fill(buf)
	began := time.Now()
	var next atomic.Int64
	var all sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for next.Add(int64(len(buf)))-int64(len(buf)) < size {
				for off := 0; off < len(buf); off += kernel.BlockSize {
					if block := buf[off : off+kernel.BlockSize]; !blocksum.IsZero(block) {
						key.Sum(block)
					}
				}
			}
		})
	}
	all.Wait()
	return time.Since(began)
}
