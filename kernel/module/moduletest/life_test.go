// SPDX-License-Identifier: BSD-2-Clause

package moduletest

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// meminfo is a line of /proc/meminfo, in KiB.
func meminfo(t *testing.T, key string) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); f[0] == key+":" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s", key)
	return 0
}

// areas are the sizes of the module's own allocations with vmalloc.
func areas(t *testing.T) (sizes []int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/vmallocinfo")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(b)) {
		if !strings.Contains(l, "[dm_dsync]") {
			continue
		}
		n, err := strconv.ParseInt(strings.Fields(l)[1], 10, 64)
		if err != nil {
			t.Fatalf("%q: %v", l, err)
		}
		sizes = append(sizes, n)
	}
	return sizes
}

func unload(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.DeleteModule("dm_dsync", unix.O_NONBLOCK)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("unload: %v", err)
		}
	}
}

// The module goes and comes, with devices, grown bitmaps, pending epochs and readers
// in between; nothing of it stays.
func TestLoadAndUnloadLeakNothing(t *testing.T) {
	need(t)
	file := os.Getenv("DSYNC_TEST_MODULE")
	if file == "" {
		t.Skip("DSYNC_TEST_MODULE names no file")
	}
	rounds := 8
	if os.Getenv("SOAK") != "" {
		rounds = 100
	}
	loop := dmtest.Loop(t, 600*mib, dmtest.LoopOptions{})
	round := func() {
		d := newDevice(t, "life", loop, 100*mib/sector)
		f := d.open(os.O_RDWR | unix.O_DIRECT)
		var wg sync.WaitGroup
		var stop atomic.Bool
		for w := range 3 {
			wg.Go(func() {
				for i := int64(w); !stop.Load(); i++ {
					_, _ = f.WriteAt(aligned(block), i*13%25600*block)
					if w == 0 {
						_, _ = os.ReadFile(d.file("blocks"))
					}
				}
			})
		}
		for i := range 3 {
			d.load(line(loop, 0, 500*mib/sector)) // thrown away
			d.reload(line(loop, 0, uint64(200+100*i)*mib/sector))
			d.turn()
		}
		d.tell("rotate %s", nonce)
		stop.Store(true)
		wg.Wait()
		_ = f.Close()
		if len(areas(t)) == 0 {
			t.Error("no memory of the module is seen: the count is worth nothing")
		}
		open, err := os.Open(d.file("active"))
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		if err := devmapper.Remove(t.Context(), d.name, devmapper.RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		if left := areas(t); len(left) > 0 {
			t.Errorf("areas of %v bytes are left", left)
		}
		// An open file does not hold the module.
		unload(t)
		if _, err := open.Read(make([]byte, 8)); err == nil {
			t.Error("a file of a module that is gone reads")
		}
		if _, err := os.Stat(proc); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", proc, err)
		}
		load(t, file)
	}
	round()
	round()
	slab := meminfo(t, "SUnreclaim")
	for range rounds {
		round()
	}
	t.Logf("SUnreclaim: %d KiB before %d rounds, %d after", slab, rounds, meminfo(t, "SUnreclaim"))
}

func load(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
		t.Fatalf("load %s: %v", file, err)
	}
}

// Objects of the size that the module's structs have do not pile up.
func TestHistoriesDoNotPileUp(t *testing.T) {
	need(t)
	pile := int64(600)
	if os.Getenv("SOAK") != "" {
		pile = 2000
	}
	loop := dmtest.Loop(t, 4*mib, dmtest.LoopOptions{})
	if _, err := devmapper.Create("pile", ""); err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, "pile")
	d := device{t, "pile"}
	once := func() {
		d.load(line(loop, 0, 8)) // a history begins
		_, _ = os.ReadFile(d.file("status"))
		if err := devmapper.Clear(d.name); err != nil { // and ends
			t.Fatal(err)
		}
	}
	for range 30 {
		once()
	}
	before := meminfo(t, "SUnreclaim")
	for range pile {
		once()
	}
	// Leaked histories or instances alone would be half a KiB each, and stay. What the kernel frees
	// later, and other slabs, come and go.
	after := meminfo(t, "SUnreclaim")
	for end := time.Now().Add(10 * time.Second); after-before > pile*4/10 && time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		after = meminfo(t, "SUnreclaim")
	}
	t.Logf("SUnreclaim: %d KiB, then %d", before, after)
	if after-before > pile*4/10 {
		t.Errorf("%d histories left %d KiB", pile, after-before)
	}
}

func TestRemovalWhileFilesAreRead(t *testing.T) {
	need(t)
	const size = 1 << 30
	loop := dmtest.Loop(t, size, dmtest.LoopOptions{})
	var stop atomic.Bool
	var wg sync.WaitGroup
	var reads, gone atomic.Int64
	for _, name := range []string{"status", "active", "blocks", "frozen"} {
		wg.Go(func() {
			for !stop.Load() {
				if _, err := os.ReadFile(proc + "/removed/" + name); err != nil {
					gone.Add(1)
				} else {
					reads.Add(1)
				}
			}
		})
	}
	defer wg.Wait()
	defer stop.Store(true)
	for range 12 {
		if _, err := devmapper.Create("removed", ""); err != nil {
			t.Fatal(err)
		}
		d := device{t, "removed"}
		d.load(line(loop, 0, size/sector))
		d.resume()
		d.tell("mark 0 %d", size/sector)
		d.tell("rotate %s", nonce)
		d.tell("mark 0 %d", size/sector)
		for seen := reads.Load(); reads.Load() < seen+3; {
			time.Sleep(time.Millisecond)
		}
		if err := devmapper.Remove(t.Context(), d.name, devmapper.RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d reads, %d of what was gone", reads.Load(), gone.Load())
}

// 4 TiB of zeros: 128 MiB a bitmap.
func TestFourTebibytes(t *testing.T) {
	need(t)
	const sectors, blocks = 4 << 31, 4 << 28
	zero := dmtest.Map(t, "zero", devmapper.Target{Length: sectors, Type: "zero"})
	if _, err := devmapper.Create("huge", ""); err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, "huge")
	d := device{t, "huge"}
	timed := func(fn func()) time.Duration {
		start := time.Now()
		fn()
		return time.Since(start)
	}
	// The first time the machine that is emulated gets its memory.
	first := timed(func() { d.load(line(zero, 0, sectors)) })
	if err := devmapper.Clear(d.name); err != nil {
		t.Fatal(err)
	}
	created := timed(func() { d.load(line(zero, 0, sectors)) })
	d.resume()
	// Two bitmaps, each with a page that guards it, and the kernel's list of its pages.
	const guarded, list = blocks/8 + 4096, blocks/8/4096*8 + 4096
	got := areas(t)
	if slices.Sort(got); !slices.Equal(got, []int64{list, list, guarded, guarded}) {
		t.Errorf("the module holds areas of %v bytes, want two of %d, and of %d", got, guarded, list)
	}
	d.put(0, blocks/2, blocks-1)
	rotate := timed(func() { d.tell("rotate %s", nonce) })
	same(t, "frozen", d.byHoles("frozen"), blocksOf(blocks, 0, blocks/2, blocks-1))
	ack := timed(func() { d.tell("ack 1") })
	d.want("dirty 0", fmt.Sprintf("blocks %d", blocks))
	all := timed(func() { d.tell("mark 0 %d", sectors) })
	var dirty int64
	status := timed(func() { dirty = d.number("dirty") })
	if dirty != blocks {
		t.Errorf("%d blocks are dirty", dirty)
	}
	d.tell("rotate %s", nonce)
	var set int64
	whole := timed(func() { set = d.countSet("frozen") })
	if set != blocks {
		t.Errorf("frozen has %d blocks", set)
	}
	ackAll := timed(func() { d.tell("ack 2") })
	d.want("dirty 0", "pending_dirty 0", "state valid")
	t.Logf("create %v, again %v, rotate %v, ack %v; with all blocks dirty: mark %v, status %v, read %v, ack %v",
		first, created, rotate, ack, all, status, whole, ackAll)
}

// countSet counts the bits of a bitmap that is too large to keep.
func (d device) countSet(file string) (n int64) {
	d.t.Helper()
	f, err := os.Open(d.file(file))
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	for buf := make([]byte, 1<<20); ; {
		got, err := f.Read(buf)
		for _, v := range buf[:got] {
			n += int64(bits.OnesCount8(v))
		}
		if errors.Is(err, io.EOF) {
			return n
		}
		if err != nil {
			d.t.Fatal(err)
		}
	}
}
