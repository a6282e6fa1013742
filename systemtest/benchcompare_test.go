// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"context"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// BenchmarkCompare measures a compare scan of a device of 8 GiB (DSYNC_BENCH_GIB) that
// was overwritten at random for 20 backups, and of which 1 % changed while nothing
// tracked it: against the speed at which the device can be read, and that of the
// hash on all cores, and against stock restic on the same file, in the same run. Run it
// with -benchtime 1x.
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
	writeBlocks(b, f, c, someBlocks(r, size, blocks/100))

	rate := func(took time.Duration) float64 { return float64(size) / 1e6 / took.Seconds() }
	disk := rate(readDevice(b, d.path, size))
	hash := rate(hashAll(c, size))
	began := time.Now()
	s := e.backup(d.path)
	ours := rate(time.Since(began))
	if s.BytesRead != size || s.DataAdded > int64(blocks/100*kernel.BlockSize)*11/10 {
		b.Errorf("%+v", s)
	}
	began = time.Now()
	stock.restic("0.18", "backup", d.file)
	theirs := rate(time.Since(began))

	b.ReportMetric(disk, "disk-MB/s")
	b.ReportMetric(hash, "hash-MB/s")
	b.ReportMetric(ours, "compare-MB/s")
	b.ReportMetric(theirs, "restic-MB/s")
	b.ReportMetric(ours/min(disk, hash), "of-the-least")
	b.ReportMetric(ours/theirs, "times-restic")
	b.ReportMetric(0, "ns/op")
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
