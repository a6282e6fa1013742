// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

func TestStartTwiceIsAnError(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	tr := track(t, device)
	_, err := Start(t.Context(), device, Options{})
	if err == nil || !strings.Contains(err.Error(), "tracked already") {
		t.Fatalf("second start: %v", err)
	}
	wantReliable(t, tr)
}

func TestOpenWithoutTracker(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	if _, err := Open(device); !errors.Is(err, kernel.ErrNotTracked) {
		t.Fatalf("got %v, want ErrNotTracked", err)
	}
}

func TestOpenByLinkFindsTheSameTracker(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	by := filepath.Join(t.TempDir(), "by-id")
	if err := os.Symlink(device, by); err != nil {
		t.Fatal(err)
	}
	tr := track(t, by)
	again, err := Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.UUID() != tr.UUID() || again.Device() != device {
		t.Fatalf("opened %s of %s, want %s of %s", again.UUID(), again.Device(), tr.UUID(), device)
	}
}

func TestListHasEveryTracker(t *testing.T) {
	want := map[string]kernel.UUID{}
	for range 3 {
		device, _ := newLoop(t, 8<<20)
		want[device] = track(t, device).UUID()
	}
	all, err := List()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]kernel.UUID{}
	for _, tr := range all {
		got[tr.Device()] = tr.UUID()
		_ = tr.Close()
	}
	for device, uuid := range want {
		if got[device] != uuid {
			t.Errorf("%s: listed as %s, want %s", device, got[device], uuid)
		}
	}
}

func TestRefusesWhatItCannotTrack(t *testing.T) {
	t.Run("File", func(t *testing.T) {
		wantRefused(t, filepath.Join(t.TempDir()), "not a block device")
	})
	t.Run("CharacterDevice", func(t *testing.T) {
		wantRefused(t, "/dev/zero", "not a block device")
	})
	t.Run("NoMedium", func(t *testing.T) {
		device, _ := newLoop(t, 8<<20)
		run(t, "losetup", "-d", device)
		wantRefused(t, device, "it has no size")
	})
	t.Run("BioBased", func(t *testing.T) {
		number := readText("/sys/class/zram-control/hot_add") // reading adds one
		if number == "" {
			t.Fatal("this kernel has no zram (CONFIG_ZRAM)")
		}
		t.Cleanup(func() { writeSysfs(t, "/sys/class/zram-control/hot_remove", number) })
		writeSysfs(t, "/sys/block/zram"+number+"/disksize", "8388608")
		wantRefused(t, "/dev/zram"+number, "takes bios instead of requests")
	})
	t.Run("NotCounting", func(t *testing.T) {
		device, _ := newLoop(t, 8<<20)
		writeSysfs(t, "/sys/block/"+filepath.Base(device)+"/queue/iostats", "0")
		defer writeSysfs(t, "/sys/block/"+filepath.Base(device)+"/queue/iostats", "1")
		wantRefused(t, device, "does not count its writes")
	})
}

func writeSysfs(t testing.TB, path, value string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

func wantRefused(t *testing.T, device, reason string) {
	t.Helper()
	tr, err := Start(t.Context(), device, Options{})
	if err == nil {
		_ = tr.Stop(t.Context())
		t.Fatalf("%s is tracked", device)
	}
	if !strings.Contains(err.Error(), reason) || strings.Contains(err.Error(), "\n") {
		t.Fatalf("refused with %q, want one line with %q", err, reason)
	}
}

func TestUnreliable(t *testing.T) {
	for name, c := range map[string]struct {
		break_ func(t *testing.T, tr *Tracker, device, file string)
		reason string
	}{
		"Grown": {func(t *testing.T, _ *Tracker, device, file string) {
			if err := os.Truncate(file, 16<<20); err != nil {
				t.Fatal(err)
			}
			run(t, "losetup", "-c", device)
		}, "changed its size from 8388608 to 16777216"},
		"LoopReused": {func(t *testing.T, _ *Tracker, device, file string) {
			run(t, "losetup", "-d", device)
			run(t, "losetup", device, file)
		}, "it was detached, or another medium came in"},
		"LoopMoved": {func(t *testing.T, _ *Tracker, device, file string) {
			// The file grows by as much, so that the size stays.
			if err := os.Truncate(file, 8<<20+1<<20); err != nil {
				t.Fatal(err)
			}
			f := openDevice(t, device, os.O_RDWR)
			info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			info.Offset = 1 << 20
			if err := unix.IoctlLoopSetStatus64(int(f.Fd()), info); err != nil {
				t.Fatal(err)
			}
		}, "was moved in its file from byte 0 to 1048576"},
		"LinkRemoved": {func(t *testing.T, tr *Tracker, _, _ string) {
			remove(t, filepath.Join(tr.dir, "link_rq_issue_1"))
		}, "its tracing link rq_issue_1 is gone"},
		"LinkReplaced": {func(t *testing.T, tr *Tracker, _, _ string) {
			replaceLink(t, tr)
		}, "its tracing link rq_complete_0 was replaced"},
		"MapRemoved": {func(t *testing.T, tr *Tracker, _, _ string) {
			remove(t, filepath.Join(tr.dir, objectMapBits1))
		}, "its pinned map bits1 is gone"},
		"MapReplaced": {func(t *testing.T, tr *Tracker, _, _ string) {
			pin := filepath.Join(tr.dir, objectMapRaised)
			remove(t, pin)
			replaceMap(t, pin)
		}, "its pinned map raised was replaced"},
		"ActiveReplaced": {func(t *testing.T, tr *Tracker, _, _ string) {
			if err := tr.activeMap().Put(uint32(0), tr.bits(1)); err != nil {
				t.Fatal(err)
			}
		}, "its active bitmap was replaced"},
		"Stopped": {func(t *testing.T, tr *Tracker, device, _ string) {
			other, err := Open(device)
			if err != nil {
				t.Fatal(err)
			}
			if err := other.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
		}, "tracking was stopped"},
		"Invalidated": {func(t *testing.T, tr *Tracker, _, _ string) {
			if err := tr.Invalidate(t.Context(), "because\nI say so"); err != nil {
				t.Fatal(err)
			}
		}, "because I say so"},
		"Flagged": {func(t *testing.T, tr *Tracker, _, _ string) {
			if err := tr.raisedMap().Put(uint32(0), flagPassthrough|flagHibernated); err != nil {
				t.Fatal(err)
			}
		}, "SCSI or NVMe passthrough"},
	} {
		t.Run(name, func(t *testing.T) {
			device, file := newLoop(t, 8<<20)
			tr := track(t, device)
			wantReliable(t, tr)
			c.break_(t, tr, device, file)
			wantUnreliable(t, tr, c.reason)
			wantUnreliable(t, tr, c.reason) // and so it stays
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// replaceLink detaches a program and attaches another of the same kind.
func replaceLink(t *testing.T, tr *Tracker) {
	t.Helper()
	coll, err := load(tr.target)
	if err != nil {
		t.Fatal(err)
	}
	defer coll.Close()
	pin := filepath.Join(tr.dir, "link_rq_complete_0")
	remove(t, pin)
	l, err := link.AttachTracing(link.TracingOptions{Program: coll.Programs[objectProgRqComplete0], AttachType: ebpf.AttachTraceRawTp})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.Pin(pin), l.Close()); err != nil {
		t.Fatal(err)
	}
}

func replaceMap(t *testing.T, pin string) {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Pin(pin), m.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestAnotherVersionIsUnreliableAndCanBeStopped(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	tr := track(t, device)
	b, err := loadRecord(tr.stateMap())
	if err != nil {
		t.Fatal(err)
	}
	b[8]++ // the version
	if err := storeRecord(tr.stateMap(), b); err != nil {
		t.Fatal(err)
	}
	other, err := Open(device)
	if err != nil {
		t.Fatal(err)
	}
	wantUnreliable(t, other, "another version of dsync-backup")
	if _, err := other.Rotate(t.Context(), kernel.NewNonce()); err == nil {
		t.Fatal("rotated a tracker of another version")
	}
	if err := other.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(device); !errors.Is(err, kernel.ErrNotTracked) {
		t.Fatalf("got %v, want ErrNotTracked", err)
	}
}

// TestReplacedIsSeenByThePrograms detaches the device and brings another one
// in, so that its number and size are the same again, and looks only at the
// flags that the programs raise.
func TestReplacedIsSeenByThePrograms(t *testing.T) {
	device, file := newLoop(t, 8<<20)
	tr := track(t, device)
	run(t, "losetup", "-d", device)
	run(t, "losetup", device, file)
	f := openDirect(t, device)
	if _, err := f.WriteAt(alignedBuffer(4096), 0); err != nil {
		t.Fatal(err)
	}
	var raised uint64
	if err := tr.raisedMap().Lookup(uint32(0), &raised); err != nil {
		t.Fatal(err)
	}
	if raised&flagReplaced == 0 {
		t.Fatalf("flags are %#x", raised)
	}
}

func TestHarmlessPassthroughKeepsReliability(t *testing.T) {
	// The serial number is read with a passthrough request to the driver.
	if !exists("/sys/block/vda/serial") {
		t.Fatal("there is no virtio disk /dev/vda to ask")
	}
	if _, err := Open("/dev/vda"); !errors.Is(err, kernel.ErrNotTracked) {
		t.Fatalf("/dev/vda is tracked already (%v)", err)
	}
	// Passthrough is judged when it is issued.
	tr, err := Start(t.Context(), "/dev/vda", Options{skip: func(p string) bool { return !strings.HasPrefix(p, "rq_issue") }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopIfTracked(t, "/dev/vda", tr.dir) })
	for range 10 {
		if _, err := os.ReadFile("/sys/block/vda/serial"); err != nil {
			t.Fatal(err)
		}
	}
	wantReliable(t, tr)
}

func TestStopLeavesNothing(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	if err := Supported(); err != nil { // reads what is cached for good
		t.Fatal(err)
	}
	descriptors := countDescriptors(t)
	want := mapCount + len(wantedPrograms(t, device))
	for range 5 {
		tr, err := Start(t.Context(), device, Options{})
		if err != nil {
			t.Fatal(err)
		}
		pinned, err := os.ReadDir(tr.dir)
		if err != nil || len(pinned) != want {
			t.Fatalf("%d pinned objects, want %d: %v", len(pinned), want, err)
		}
		rotate(t, tr)
		wantReliable(t, tr)
		dir, maps := tr.dir, mapIDs(t, tr)
		if err := tr.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if exists(dir) {
			t.Fatalf("%s is still there", dir)
		}
		wantGone(t, maps)
	}
	if after := countDescriptors(t); after > descriptors {
		t.Fatalf("%d open descriptors, before it were %d", after, descriptors)
	}
}

// wantedPrograms names the programs that a device's tracker has.
func wantedPrograms(t *testing.T, device string) (names []string) {
	t.Helper()
	target, err := resolve(device)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range programNames {
		if target.wants(name) {
			names = append(names, name)
		}
	}
	return names
}

func countDescriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func mapIDs(t *testing.T, tr *Tracker) []uint32 {
	t.Helper()
	s, err := loadState(tr.stateMap())
	if err != nil {
		t.Fatal(err)
	}
	return slices.Clone(s.Maps[:])
}

// wantGone waits until the kernel has freed the maps, which it does from a
// workqueue after a grace period.
func wantGone(t *testing.T, maps []uint32) {
	t.Helper()
	for _, id := range maps {
		waitFor(t, "the kernel frees a map", func() bool {
			m, err := ebpf.NewMapFromID(ebpf.MapID(id))
			if err == nil {
				_ = m.Close()
			}
			return errors.Is(err, os.ErrNotExist)
		})
	}
}
