// SPDX-License-Identifier: BSD-2-Clause

package devmapper_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

const testSectors = 2048

func linear(device string, offset uint64) devmapper.Target {
	return devmapper.Target{Length: testSectors, Type: "linear", Params: fmt.Sprintf("%s %d", device, offset)}
}

func number(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Rdev
}

func wantErr(t *testing.T, err, want error, text string) {
	t.Helper()
	if !errors.Is(err, want) || !strings.Contains(fmt.Sprint(err), text) || strings.Contains(fmt.Sprint(err), "\n") {
		t.Errorf("error %v; want one line that is %v and has %q", err, want, text)
	}
}

func TestNamesThatNeedNoMangling(t *testing.T) {
	for _, name := range []string{"a", "vg-lv", "x.y:z=1@#+_", strings.Repeat("n", 127)} {
		if err := devmapper.CheckName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", "control", "a/b", "a b", `a\x20b`, "ä", "a\n", "a*", strings.Repeat("n", 128)} {
		if err := devmapper.CheckName(name); err == nil {
			t.Errorf("%q was let pass", name)
		}
	}
}

func TestADeviceLivesFromCreateToRemove(t *testing.T) {
	dmtest.Need(t)
	below := dmtest.Loop(t, testSectors*512, dmtest.LoopOptions{})
	const name, uuid = "test-life", "TEST-0123"
	made, err := devmapper.Create(name, uuid)
	if err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, name)
	if made.Live || made.Inactive || made.Name != name || made.UUID != uuid {
		t.Errorf("created: %+v", made)
	}
	_, err = devmapper.Create(name, "TEST-other")
	wantErr(t, err, unix.EBUSY, "create device-mapper device "+name)
	_, err = devmapper.Create("test-other", uuid)
	wantErr(t, err, unix.EBUSY, "create")

	if err := devmapper.Load(name, devmapper.LoadOptions{}, linear(below, 0)); err != nil {
		t.Fatal(err)
	}
	info, err := devmapper.Stat(name)
	if err != nil || info.Live || !info.Inactive {
		t.Errorf("loaded: %+v, %v", info, err)
	}
	want := fmt.Sprintf("%d:%d 0", unix.Major(number(t, below)), unix.Minor(number(t, below)))
	table, err := devmapper.Table(name, devmapper.Query{Inactive: true})
	if err != nil || len(table) != 1 || table[0] != (devmapper.Target{Length: testSectors, Type: "linear", Params: want}) {
		t.Errorf("inactive table: %v, %v", table, err)
	}
	if table, err := devmapper.Table(name, devmapper.Query{}); err != nil || len(table) != 0 {
		t.Errorf("live table before the resume: %v, %v", table, err)
	}
	if err := devmapper.Resume(t.Context(), name, devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	info, err = devmapper.Stat(name)
	if err != nil || !info.Live || info.Inactive || info.Suspended || info.ReadOnly || info.Targets != 1 || info.Opens != 0 {
		t.Errorf("resumed: %+v, %v", info, err)
	}
	if number(t, devmapper.Path(name)) != info.Dev || dmtest.Sectors(t, devmapper.Path(name)) != testSectors {
		t.Errorf("the node is not the device")
	}
	if deps, err := devmapper.Deps(name); err != nil || !slices.Equal(deps, []uint64{number(t, below)}) {
		t.Errorf("deps %v, %v", deps, err)
	}
	if found, err := devmapper.Find(info.Dev); err != nil || found.Name != name {
		t.Errorf("found %+v, %v", found, err)
	}
	if err := devmapper.Remove(t.Context(), name, devmapper.RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err = devmapper.Stat(name)
	wantErr(t, err, unix.ENXIO, name)
	if _, err := os.Lstat(devmapper.Path(name)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the node is still there: %v", err)
	}
}

func TestARefusedTableLeavesTheDeviceAlone(t *testing.T) {
	dmtest.Need(t)
	below := dmtest.Loop(t, testSectors*512, dmtest.LoopOptions{})
	dmtest.Map(t, "test-refused", linear(below, 0))
	err := devmapper.Load("test-refused", devmapper.LoadOptions{}, devmapper.Target{Length: 8, Type: "linear", Params: below})
	wantErr(t, err, unix.EINVAL, "load a table for device-mapper device test-refused")
	err = devmapper.Load("test-refused", devmapper.LoadOptions{}, devmapper.Target{Length: 8, Type: "nonsense"})
	wantErr(t, err, unix.EINVAL, "test-refused")
	if info, err := devmapper.Stat("test-refused"); err != nil || !info.Live || info.Inactive {
		t.Errorf("%+v, %v", info, err)
	}
}

func TestATableOfManyTargetsIsReadAsItWasLoaded(t *testing.T) {
	dmtest.Need(t)
	below := dmtest.Loop(t, 3*testSectors*512, dmtest.LoopOptions{})
	var want []devmapper.Target
	params := fmt.Sprintf("%d:%d", unix.Major(number(t, below)), unix.Minor(number(t, below)))
	for i := range uint64(700) { // 700 × 64 bytes are more than the first answer holds
		target := devmapper.Target{Start: i * 8, Length: 8, Type: "zero"}
		if i%3 > 0 {
			target.Type, target.Params = "linear", fmt.Sprintf("%s %d", params, i*7)
		}
		want = append(want, target)
	}
	dmtest.Map(t, "test-many", want...)
	got, err := devmapper.Table("test-many", devmapper.Query{})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v; read %d targets, the first: %v", err, len(got), got[:min(len(got), 4)])
	}
}

func TestSuspendHoldsWritesUntilResume(t *testing.T) {
	dmtest.Need(t)
	below := dmtest.Loop(t, testSectors*512, dmtest.LoopOptions{})
	path := dmtest.Map(t, "test-suspend", linear(below, 0))
	for _, o := range []devmapper.SuspendOptions{{}, {SkipLockFS: true}, {NoFlush: true}, {SkipLockFS: true, NoFlush: true}} {
		if err := devmapper.Suspend(t.Context(), "test-suspend", o); err != nil {
			t.Fatal(err)
		}
		if err := devmapper.Suspend(t.Context(), "test-suspend", o); err != nil {
			t.Errorf("suspend it again: %v", err)
		}
		if info, err := devmapper.Stat("test-suspend"); err != nil || !info.Suspended {
			t.Errorf("%+v: %+v, %v", o, info, err)
		}
		wrote := make(chan error, 1)
		go func() {
			f, err := os.OpenFile(path, os.O_RDWR|unix.O_DSYNC, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("late"), 0)
				err = errors.Join(err, f.Close())
			}
			wrote <- err
		}()
		select {
		case err := <-wrote:
			t.Errorf("%+v: a write went through a suspended device: %v", o, err)
			wrote <- nil
		case <-sleep():
		}
		if err := devmapper.Resume(t.Context(), "test-suspend", devmapper.ResumeOptions{NoNode: true}); err != nil {
			t.Fatal(err)
		}
		if err := <-wrote; err != nil {
			t.Error(err)
		}
	}
}

func TestAReloadSwapsTheTable(t *testing.T) {
	dmtest.Need(t)
	below := dmtest.Loop(t, 2*testSectors*512, dmtest.LoopOptions{})
	path := dmtest.Map(t, "test-reload", linear(below, 0))
	load := func(target devmapper.Target) {
		if err := devmapper.Load("test-reload", devmapper.LoadOptions{}, target); err != nil {
			t.Fatal(err)
		}
	}
	longer := linear(below, 0)
	longer.Length *= 2
	load(longer)
	if err := devmapper.Clear("test-reload"); err != nil {
		t.Fatal(err)
	}
	if info, err := devmapper.Stat("test-reload"); err != nil || info.Inactive {
		t.Errorf("cleared: %+v, %v", info, err)
	}
	load(longer)
	if err := devmapper.Resume(t.Context(), "test-reload", devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	if n := dmtest.Sectors(t, path); n != longer.Length {
		t.Errorf("%d sectors after the reload", n)
	}
}

func TestADeviceInUseIsNotRemoved(t *testing.T) {
	dmtest.Need(t)
	path := dmtest.Map(t, "test-busy", devmapper.Target{Length: 8, Type: "zero"})
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantErr(t, devmapper.Remove(ctx, "test-busy", devmapper.RemoveOptions{}), unix.EBUSY, "remove device-mapper device test-busy")
	if info, err := devmapper.Stat("test-busy"); err != nil || info.Opens != 1 {
		t.Errorf("%+v, %v", info, err)
	}
	if err := devmapper.Remove(t.Context(), "test-busy", devmapper.RemoveOptions{Deferred: true}); err != nil {
		t.Fatal(err)
	}
	if info, err := devmapper.Stat("test-busy"); err != nil || !info.DeferredRemove {
		t.Errorf("%+v, %v", info, err)
	}
	f.Close()
	waitGone(t, "test-busy")
	_ = os.Remove(path) // nobody was there any more to remove the node
}

func TestMessagesAreAnswered(t *testing.T) {
	dmtest.Need(t)
	dmtest.Map(t, "test-message", devmapper.Target{Length: testSectors, Type: "zero"})
	// Every device keeps statistics, whatever its targets.
	for want := range 300 {
		got, err := devmapper.Message("test-message", 0, "@stats_create - /1 the_program "+strings.Repeat("x", 100))
		if err != nil || got != fmt.Sprint(want) {
			t.Fatalf("region %q, %v; want %d", got, err, want)
		}
	}
	if got, err := devmapper.Message("test-message", 0, "@stats_delete 3"); got != "" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := devmapper.Message("test-message", 0, "@stats_list"); err == nil {
		t.Errorf("an answer of %d bytes was cut", len(got))
	}
	if got, err := devmapper.Message("test-message", 0, "@stats_list the_other"); got != "" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	_, err := devmapper.Message("test-message", 0, "hello you")
	wantErr(t, err, unix.EINVAL, `send message "hello" to device-mapper device test-message`)
}

func TestListHasAllDevices(t *testing.T) {
	dmtest.Need(t)
	want := map[string]bool{}
	for i := range 150 {
		name := fmt.Sprintf("test-list-%s-%d", strings.Repeat("l", 100), i)
		if _, err := devmapper.Create(name, fmt.Sprintf("TEST-%d", i)); err != nil {
			t.Fatal(err)
		}
		dmtest.RemoveAtEnd(t, name)
		want[name] = true
	}
	list, err := devmapper.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if info, err := devmapper.Find(e.Dev); err != nil || info.Name != e.Name {
			t.Errorf("%+v: %+v, %v", e, info, err)
		}
		delete(want, e.Name)
	}
	if len(want) > 0 {
		t.Errorf("%d devices are missing", len(want))
	}
}

func TestVersionsOfTargets(t *testing.T) {
	dmtest.Need(t)
	if v, err := devmapper.TargetVersion("linear"); err != nil || v[0] != 1 {
		t.Errorf("%v, %v", v, err)
	}
	_, err := devmapper.TargetVersion("nonsense")
	wantErr(t, err, unix.EINVAL, "nonsense")
}

func TestAReadOnlyTable(t *testing.T) {
	dmtest.Need(t)
	below := dmtest.Loop(t, testSectors*512, dmtest.LoopOptions{ReadOnly: true})
	if _, err := devmapper.Create("test-ro", ""); err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, "test-ro")
	if err := devmapper.Load("test-ro", devmapper.LoadOptions{ReadOnly: true}, linear(below, 0)); err != nil {
		t.Fatal(err)
	}
	if err := devmapper.Resume(t.Context(), "test-ro", devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	if info, err := devmapper.Stat("test-ro"); err != nil || !info.ReadOnly {
		t.Errorf("%+v, %v", info, err)
	}
}
