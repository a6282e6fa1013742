// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"fmt"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// swap puts another table in place.
func (m mapped) swap(t testing.TB, targets ...devmapper.Target) {
	t.Helper()
	if err := devmapper.Load(m.name, devmapper.LoadOptions{}, targets...); err != nil {
		t.Fatal(err)
	}
	if err := devmapper.Resume(noContext, m.name, devmapper.ResumeOptions{NoNode: true}); err != nil {
		t.Fatal(err)
	}
}

const stackSectors = 64 << 11

func line(start, length uint64, device string, offset uint64) devmapper.Target {
	return devmapper.Target{Start: start, Length: length, Type: "linear", Params: fmt.Sprintf("%s %d", device, offset)}
}

func TestTableThatComesToTheSameKeepsReliability(t *testing.T) {
	dmtest.Need(t)
	d := disksBelow(t, 1, stackSectors)[0]
	one := line(0, stackSectors, d, 0)
	two := []devmapper.Target{line(0, 1001, d, 0), line(1001, stackSectors-1001, d, 1001)}
	m := newMapped(t, "stack", one)
	tr := track(t, m.device)
	wantReliable(t, tr)
	m.swap(t, one)
	wantReliable(t, tr)
	m.swap(t, two...)
	wantReliable(t, tr)
	m.swap(t, one)
	wantReliable(t, tr)
	if err := devmapper.Suspend(t.Context(), m.name, devmapper.SuspendOptions{}); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	if err := devmapper.Resume(t.Context(), m.name, devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	wantWritesMarked16384(t, tr, m.device)
}

func wantWritesMarked16384(t *testing.T, tr *Tracker, device string) {
	t.Helper()
	write(t, openDirect(t, device), 77)
	wantEqual(t, rotate(t, tr), oneBlock(77))
	wantReliable(t, tr)
}

func TestTableThatIsReplacedMakesUnreliable(t *testing.T) {
	dmtest.Need(t)
	const to, times = "now leads to something else", "were replaced 2 times"
	for name, c := range map[string]struct {
		do     func(t *testing.T, m mapped, disks []string)
		reason string
	}{
		"Moved": {func(t *testing.T, m mapped, d []string) {
			m.swap(t, line(0, stackSectors, d[0], 8))
		}, to},
		"OtherDisk": {func(t *testing.T, m mapped, d []string) {
			m.swap(t, line(0, stackSectors, d[1], 0))
		}, to},
		"OneSegmentMoved": {func(t *testing.T, m mapped, d []string) {
			m.swap(t, line(0, 100, d[0], 0), line(100, 8, d[1], 0), line(108, stackSectors-108, d[0], 108))
		}, to},
		"ThereAndBack": {func(t *testing.T, m mapped, d []string) {
			m.swap(t, line(0, stackSectors, d[1], 0))
			m.swap(t, line(0, stackSectors, d[0], 0))
		}, times},
		"TwiceTheSame": {func(t *testing.T, m mapped, d []string) {
			m.swap(t, line(0, stackSectors, d[0], 0))
			m.swap(t, line(0, stackSectors, d[0], 0))
		}, times},
		"Grown": {func(t *testing.T, m mapped, d []string) {
			m.swap(t, line(0, stackSectors, d[0], 0), line(stackSectors, 8, d[0], stackSectors))
		}, "changed its size"},
		"Unknown": {func(t *testing.T, m mapped, d []string) {
			m.swap(t, mirror(d))
		}, "made with the device-mapper target \"mirror\""},
	} {
		t.Run(name, func(t *testing.T) {
			d := disksBelow(t, 2, stackSectors+8)
			m := newMapped(t, "stack", line(0, stackSectors, d[0], 0))
			tr := track(t, m.device)
			wantReliable(t, tr)
			c.do(t, m, d)
			wantUnreliable(t, tr, c.reason)
			wantUnreliable(t, tr, c.reason)
		})
	}
}

// TestTableBeneathIsWatched replaces tables of a device beneath the tracked one,
// through a target that computes its content.
func TestTableBeneathIsWatched(t *testing.T) {
	dmtest.Need(t)
	d := disksBelow(t, 2, stackSectors)
	for name, top := range map[string]func(below string) devmapper.Target{
		"linear": func(below string) devmapper.Target { return line(0, stackSectors, below, 0) },
		"crypt": func(below string) devmapper.Target {
			return devmapper.Target{Length: stackSectors, Type: "crypt", Params: "aes-xts-plain64 " + strings.Repeat("5a", 32) + " 0 " + below + " 0"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			below := newMapped(t, "below", line(0, stackSectors, d[0], 0))
			m := newMapped(t, "top", top(below.device))
			tr := track(t, m.device)
			below.swap(t, line(0, stackSectors, d[0], 0))
			wantReliable(t, tr)
			below.swap(t, line(0, stackSectors, d[1], 0))
			below.swap(t, line(0, stackSectors, d[0], 0))
			wantUnreliable(t, tr, "were replaced 2 times")
		})
	}
}

func mirror(disks []string) devmapper.Target {
	return devmapper.Target{Length: stackSectors, Type: "mirror", Params: "core 1 1024 2 " + disks[0] + " 0 " + disks[1] + " 0"}
}

func TestRefusesTargetsThatItDoesNotKnow(t *testing.T) {
	dmtest.Need(t)
	m := newMapped(t, "mirror", mirror(disksBelow(t, 2, stackSectors)))
	wantRefused(t, m.device, `made with the device-mapper target "mirror"`)
	top := newMapped(t, "top", line(0, 8, m.device, 0))
	wantRefused(t, top.device, `made with the device-mapper target "mirror"`)
}

// TestRefusesThinVolumesOfMappedPoolsThatDoNotZero also has one that stops to.
func TestRefusesThinVolumesOfMappedPoolsThatDoNotZero(t *testing.T) {
	dmtest.Need(t)
	const reason = "its thin pool does not zero blocks"
	t.Run("Before", func(t *testing.T) {
		_, volume := newPool(t, stackSectors, "1 skip_block_zeroing")
		wantRefused(t, volume.device, reason)
	})
	t.Run("After", func(t *testing.T) {
		pool, volume := newPool(t, stackSectors, "0")
		tr := track(t, volume.device)
		table, err := devmapper.Table(pool.name, devmapper.Query{})
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(table[0].Params)
		zero := table[0]
		zero.Params = strings.Join(fields[:4], " ") + " 0"
		pool.swap(t, zero)
		wantReliable(t, tr)
		zero.Params = strings.Join(fields[:4], " ") + " 1 skip_block_zeroing"
		pool.swap(t, zero)
		wantUnreliable(t, tr, reason)
	})
}

// TestSnapshotsOfALogicalVolume are taken and removed with LVM's own commands.
func TestSnapshotsOfALogicalVolume(t *testing.T) {
	dmtest.Need(t)
	start := func(t *testing.T) *Tracker {
		m := newLV(t, stackSectors)
		tr := track(t, m.device)
		wantReliable(t, tr)
		return tr
	}
	snapshot := func(t *testing.T) { lvm(t, "lvcreate", "-y", "-s", "-n", "snap", "-l", "4", testVG+"/lv") }
	remove := func(t *testing.T) { lvm(t, "lvremove", "-y", testVG+"/snap") }
	t.Run("LookedAt", func(t *testing.T) {
		tr := start(t)
		for range 3 {
			snapshot(t)
			wantReliable(t, tr)
			wantWritesMarked16384(t, tr, tr.Device())
			remove(t)
			wantReliable(t, tr)
			wantWritesMarked16384(t, tr, tr.Device())
		}
	})
	t.Run("NotLookedAt", func(t *testing.T) {
		tr := start(t)
		snapshot(t)
		remove(t)
		wantUnreliable(t, tr, "were replaced 2 times")
	})
	t.Run("Merged", func(t *testing.T) {
		tr := start(t)
		snapshot(t)
		wantReliable(t, tr)
		f := openDirect(t, tr.Device())
		write(t, f, 1)
		if err := f.Close(); err != nil { // open, it would be merged later
			t.Fatal(err)
		}
		lvm(t, "lvconvert", "-y", "--merge", testVG+"/snap")
		wantUnreliable(t, tr, "the device-mapper table")
	})
	t.Run("Extended", func(t *testing.T) {
		tr := start(t)
		lvm(t, "lvextend", "-y", "-l", "+1", testVG+"/lv")
		wantUnreliable(t, tr, "changed its size")
	})
}
