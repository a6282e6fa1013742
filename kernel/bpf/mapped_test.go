// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// envDisks names disks to build mapped devices on, whose content is of no use to
// anybody, with blanks between. Without it they are built on loop devices.
const envDisks = "DSYNC_TEST_DISKS"

// disksBelow are n devices of at least so many sectors.
func disksBelow(t testing.TB, n int, sectors uint64) []string {
	t.Helper()
	if given := strings.Fields(os.Getenv(envDisks)); len(given) >= n {
		for _, d := range given[:n] {
			if have := dmtest.Sectors(t, d); have < sectors {
				t.Fatalf("%s has %d sectors, %d are needed", d, have, sectors)
			}
		}
		return given[:n]
	}
	var out []string
	for range n {
		out = append(out, dmtest.Loop(t, int64(sectors)*512, dmtest.LoopOptions{}))
	}
	return out
}

// mapped is a device-mapper device under test.
type mapped struct{ device, name string }

// mappedKind makes a device of so many sectors.
type mappedKind struct {
	name string
	make func(t testing.TB, sectors uint64) mapped
}

var mappedKinds = []mappedKind{
	{"linear", newLinear},
	{"striped", func(t testing.TB, sectors uint64) mapped {
		d := disksBelow(t, 2, sectors)
		size := sectors / 32 * 32 // the rest is linear
		return newMapped(t, "striped",
			devmapper.Target{Length: size, Type: "striped", Params: fmt.Sprintf("2 16 %s 8 %s 0", d[0], d[1])},
			devmapper.Target{Start: size, Length: sectors - size, Type: "linear", Params: fmt.Sprintf("%s %d", d[0], size/2+8)})
	}},
	{"delay", func(t testing.TB, sectors uint64) mapped {
		d := disksBelow(t, 1, sectors)[0]
		return newMapped(t, "delay", devmapper.Target{Length: sectors, Type: "delay", Params: d + " 0 0 " + d + " 0 5"})
	}},
	{"origin", newOrigin},
	{"crypt", func(t testing.TB, sectors uint64) mapped {
		d := disksBelow(t, 1, sectors)[0]
		return newMapped(t, "crypt", devmapper.Target{
			Length: sectors, Type: "crypt",
			Params: "aes-xts-plain64 " + strings.Repeat("5a", 32) + " 0 " + d + " 0 1 allow_discards",
		})
	}},
	{"thin", newThin},
	{"lvm", newLV},
}

func newMapped(t testing.TB, name string, targets ...devmapper.Target) mapped {
	t.Helper()
	name = "dsync-test-" + name
	var last []devmapper.Target
	for _, target := range targets {
		if target.Length > 0 {
			last = append(last, target)
		}
	}
	return mapped{dmtest.Map(t, name, last...), name}
}

// linearTable is three segments on two disks, whose bounds lie within blocks and
// whose middle one is short: what goes over it is split in three.
func linearTable(disks []string, sectors uint64) []devmapper.Target {
	first := sectors/2 + 3
	return []devmapper.Target{
		{Length: first, Type: "linear", Params: disks[0] + " 16"},
		{Start: first, Length: 6, Type: "linear", Params: disks[1] + " 3"},
		{Start: first + 6, Length: sectors - first - 6, Type: "linear", Params: disks[1] + " 64"},
	}
}

func newLinear(t testing.TB, sectors uint64) mapped {
	return newMapped(t, "linear", linearTable(disksBelow(t, 2, sectors), sectors)...)
}

func newOrigin(t testing.TB, sectors uint64) mapped {
	d := disksBelow(t, 2, sectors)
	real := newMapped(t, "real", linearTable(d, sectors)...)
	cow := newMapped(t, "cow", devmapper.Target{Length: sectors, Type: "linear", Params: dmtest.Loop(t, int64(sectors)*512, dmtest.LoopOptions{}) + " 0"})
	snapshot := devmapper.Target{Length: sectors, Type: "snapshot", Params: real.device + " " + cow.device + " N 16"}
	newMapped(t, "snap", snapshot)
	return newMapped(t, "origin", devmapper.Target{Length: sectors, Type: "snapshot-origin", Params: real.device})
}

func newThin(t testing.TB, sectors uint64) mapped {
	t.Helper()
	_, volume := newPool(t, sectors, "0")
	return volume
}

// newPool makes a pool with options, and a volume in it.
func newPool(t testing.TB, sectors uint64, options string) (pool mapped, volume mapped) {
	t.Helper()
	meta := dmtest.Loop(t, 4<<20, dmtest.LoopOptions{})
	data := disksBelow(t, 1, sectors)[0]
	pool = newMapped(t, "pool", devmapper.Target{
		Length: dmtest.Sectors(t, data) / 128 * 128, Type: "thin-pool",
		Params: meta + " " + data + " 128 0 " + options,
	})
	if _, err := devmapper.Message(pool.name, 0, "create_thin 0"); err != nil {
		t.Fatal(err)
	}
	return pool, newMapped(t, "thin", devmapper.Target{Length: sectors, Type: "thin", Params: pool.device + " 0"})
}

const (
	testVG  = "dsynctestvg"
	extents = 8192 // sectors in one
)

// newLV makes a logical volume that lies on two physical ones.
func newLV(t testing.TB, sectors uint64) mapped {
	t.Helper()
	d := disksBelow(t, 2, sectors)
	lvm(t, "pvcreate", "-y", "-ff", d[0], d[1])
	lvm(t, "vgcreate", "-s", "4m", testVG, d[0], d[1])
	t.Cleanup(func() {
		lvm(t, "vgremove", "-y", "-f", testVG)
		lvm(t, "pvremove", "-y", d[0], d[1])
	})
	n := (sectors + extents - 1) / extents
	lvm(t, "lvcreate", "-y", "-Wn", "-Zn", "-n", "lv", "-l", fmt.Sprint(n/2), testVG, d[0])
	lvm(t, "lvextend", "-y", "-l", fmt.Sprint(n), testVG+"/lv", d[1])
	return mapped{"/dev/" + testVG + "/lv", testVG + "-lv"}
}

func lvm(t testing.TB, args ...string) string {
	t.Helper()
	return run(t, "lvm", args...)
}

// eachMapped runs a test with a device of each kind.
func eachMapped(t *testing.T, sectors uint64, test func(t *testing.T, m mapped)) {
	t.Helper()
	dmtest.Need(t)
	for _, k := range mappedKinds {
		t.Run(k.name, func(t *testing.T) { test(t, k.make(t, sectors)) })
	}
}

func TestMappedBitmapEqualsAlignedDirectWrites(t *testing.T) {
	eachMapped(t, 64<<11+1, func(t *testing.T, m mapped) {
		testAlignedWrites(t, m.device, int64(dmtest.Sectors(t, m.device))*512, int(guestCount(8)))
	})
}

// TestMappedMarksEveryKindOfWrite also runs with the programs of each copy of
// submission alone: the mark at completion comes from what they remember.
func TestMappedMarksEveryKindOfWrite(t *testing.T) {
	eachMapped(t, 1<<30/512, func(t *testing.T, m mapped) {
		testEveryKindOfWrite(t, m.device, "")
	})
	for _, keep := range []string{"bio_queue_0", "bio_queue_1", "bio_queue_2"} {
		t.Run(keep, func(t *testing.T) {
			testEveryKindOfWrite(t, newLinear(t, 1<<30/512).device, keep)
		})
	}
}

// testEveryKindOfWrite runs with one program only, if one is named.
func testEveryKindOfWrite(t *testing.T, device, keep string) {
	tr := trackWith(t, device, Options{skip: func(p string) bool { return keep != "" && p != keep }})
	want := kernel.NewBitmap(1 << 18)
	for _, op := range everyKindOfWrite {
		if !supports(t, device, op.needs) {
			t.Logf("%s: not supported", op.name)
			continue
		}
		op.do(t, device)
		want.SetRange(op.first, op.first+op.n-1)
		wantEqual(t, mustPeek(t, tr), want)
	}
	wantReliable(t, tr)
}

func trackWith(t testing.TB, device string, o Options) *Tracker {
	t.Helper()
	tr, err := Start(t.Context(), device, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopIfTracked(t, device, tr.dir) })
	return tr
}

// TestNoChangeOfMappedIsMissed is the superset property on each kind of device,
// which is suspended and resumed, and gets its table anew, under the load.
func TestNoChangeOfMappedIsMissed(t *testing.T) {
	const blocks = 1 << 12 // 16 MiB
	eachMapped(t, blocks*8, func(t *testing.T, m mapped) {
		patient := slices.Contains([]string{"delay", "crypt", "thin"}, filepath.Base(t.Name()))
		(&superset{
			device: m.device, blocks: blocks, patient: patient, pastCache: blocks / 8 * 7,
			count: guestCount(600), rotations: guestCount(20), alone: true, disturb: m.disturb,
		}).run(t)
	})
}

func guestCount(n int64) int64 {
	if os.Getenv("SOAK") != "" {
		return n * 3
	}
	return n
}

// TestNoChangeOfVirtioDiskIsMissed is the same on a disk that takes requests.
func TestNoChangeOfVirtioDiskIsMissed(t *testing.T) {
	dmtest.Need(t)
	disk := disksBelow(t, 1, 64<<11)[0]
	blocks := int64(dmtest.Sectors(t, disk)) / 8
	blocks = min(blocks, 1<<13)
	(&superset{device: disk, blocks: blocks, pastCache: blocks / 8 * 7, count: guestCount(1000), rotations: guestCount(20), alone: true}).run(t)
}

// TestNoFailedWriteIsMissed writes over segments of which one fails writes, so
// that some parts of a write change the device and others do not.
func TestNoFailedWriteIsMissed(t *testing.T) {
	dmtest.Need(t)
	const blocks = 1 << 13
	d := disksBelow(t, 2, blocks*8)
	third := uint64(blocks * 8 / 3)
	m := newMapped(t, "flakey",
		devmapper.Target{Length: third, Type: "linear", Params: d[0] + " 0"},
		devmapper.Target{Start: third, Length: third, Type: "flakey", Params: fmt.Sprintf("%s %d 0 1 1 error_writes", d[0], third)},
		devmapper.Target{Start: 2 * third, Length: blocks*8 - 2*third, Type: "linear", Params: d[1] + " 0"})
	(&superset{device: m.device, blocks: blocks, pastCache: blocks, count: guestCount(1000), rotations: guestCount(20), alone: true, fails: true, patient: true, disturb: m.disturb}).run(t)
}

// disturb suspends the device while an epoch is rotated, and puts its table in
// anew, in different ways.
func (m mapped) disturb(t *testing.T, round int64, tr *Tracker, rotate func()) {
	done := make(chan error)
	go func() { done <- m.cycle(round) }()
	rotate()
	if err := <-done; err != nil {
		t.Error(err)
	}
	wantReliable(t, tr)
}

func (m mapped) cycle(round int64) error {
	o := devmapper.SuspendOptions{NoFlush: round&1 != 0, SkipLockFS: round&1 != 0 || round&2 != 0}
	if round%5 == 0 {
		return nil
	}
	if round&4 != 0 {
		table, err := devmapper.Table(m.name, devmapper.Query{})
		if err == nil {
			err = devmapper.Load(m.name, devmapper.LoadOptions{}, table...)
		}
		if err != nil {
			return err
		}
	}
	if round&2 != 0 {
		if err := devmapper.Suspend(noContext, m.name, o); err != nil {
			return err
		}
	}
	return devmapper.Resume(noContext, m.name, devmapper.ResumeOptions{SuspendOptions: o, NoNode: true})
}

// TestMappedSplitsAreNoStrangers discards and writes what is split many times:
// the parts complete without having been queued of their own.
func TestMappedSplitsAreNoStrangers(t *testing.T) {
	dmtest.Need(t)
	m := newLinear(t, 64<<11)
	tr := track(t, m.device)
	limit := filepath.Join("/sys/block", filepath.Base(mustResolve(t, m.device).name), "queue/discard_max_bytes")
	if err := os.WriteFile(limit, []byte("65536"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := openDirect(t, m.device)
	want := kernel.NewBitmap(16384)
	for _, r := range [][2]int64{{100, 16000}, {8191, 2}, {1, 4}} {
		if err := rangeIoctl(f, blkDiscard, r[0], r[1]); err != nil {
			t.Fatal(err)
		}
		want.SetRange(r[0], r[0]+r[1]-1)
	}
	writeRange(t, f, 8000, 512)
	want.SetRange(8000, 8511)
	wantEqual(t, rotate(t, tr), want)
	wantReliable(t, tr)
	if n := entries(t, tr); n != 0 {
		t.Fatalf("%d writes are still in the table", n)
	}
}

func mustResolve(t testing.TB, device string) target {
	t.Helper()
	target, err := resolve(device)
	if err != nil {
		t.Fatal(err)
	}
	return target
}

// entries counts the writes in the table.
func entries(t testing.TB, tr *Tracker) (n int) {
	t.Helper()
	var key uint64
	var span objectSpan
	it := tr.inflightMap().Iterate()
	for it.Next(&key, &span) {
		n++
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestMappedProgramsLoad needs no device-mapper.
func TestMappedProgramsLoad(t *testing.T) {
	spec, err := specify(target{dev: devno{1, 1}, diskDev: devno{1, 1}, sectors: 8, mapped: true})
	if err != nil {
		t.Fatal(err)
	}
	if canCountSwaps() != nil {
		delete(spec.Programs, objectProgTableSwap)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	coll.Close()
}
