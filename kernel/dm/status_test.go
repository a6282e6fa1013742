// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

func dsync(below string, sectors int64) devmapper.Target {
	return devmapper.Target{Length: uint64(sectors), Type: targetType, Params: below + " 0"}
}

func linear(start int64, below string, sectors int64) devmapper.Target {
	return devmapper.Target{Start: uint64(start), Length: uint64(sectors), Type: "linear", Params: fmt.Sprintf("%s %d", below, start)}
}

func TestAnotherTableEndsTheHistory(t *testing.T) {
	tr := newTracked(t)
	reload(t, tr, linear(0, tr.Below(), testSize/512))
	wantUnreliable(t, tr, "tracking was stopped")
	reload(t, tr, dsync(tr.Below(), testSize/512))
	wantUnreliable(t, tr, "begun anew")
	again, err := Open(tr.Device())
	if err != nil || again.UUID() == tr.UUID() {
		t.Errorf("a history was taken up again: %v, %v", again, err)
	}
}

func TestATableThatWasSwappedOutForAMomentIsNotReliable(t *testing.T) {
	tr := newTracked(t)
	// The second dsync table is loaded while a table without is live.
	if err := devmapper.Load(tr.name, devmapper.LoadOptions{}, linear(0, tr.Below(), testSize/512)); err != nil {
		t.Fatal(err)
	}
	if err := devmapper.Suspend(t.Context(), tr.name, devmapper.SuspendOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := devmapper.Resume(t.Context(), tr.name, devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	reload(t, tr, dsync(tr.Below(), testSize/512))
	if st := status(t, tr); st.Reliable {
		t.Errorf("status %+v", st)
	}
}

func TestNoTargetStandsBeside(t *testing.T) {
	below := newLoop(t, testSize)
	tr := track(t, below)
	const half = testSize / 512 / 2
	err := devmapper.Load(tr.name, devmapper.LoadOptions{}, dsync(below, half), linear(half, below, half))
	wantErr(t, err, "invalid argument")
	wantReliable(t, tr)
}

func TestASuspendedDeviceIsReliable(t *testing.T) {
	tr := newTracked(t)
	if err := devmapper.Suspend(t.Context(), tr.name, devmapper.SuspendOptions{}); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	if err := devmapper.Resume(t.Context(), tr.name, devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
}

func TestTheSameTableAgainKeepsTheHistory(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 1)
	reload(t, tr, dsync(tr.Below(), testSize/512))
	write(t, tr, 2)
	wantReliable(t, tr)
	wantBlocks(t, turn(t, tr), 1, 2)
}

func TestAReplacedDeviceBeneathNeedsARebase(t *testing.T) {
	// Detached after the mapped device, so made before.
	other, third := newLoop(t, testSize), newLoop(t, testSize)
	tr := newTracked(t)
	if err := tr.Rebase(noContext, other, 0); err != nil {
		t.Fatal(err)
	}
	write(t, tr, 1)
	reload(t, tr, dsync(other, testSize/512))
	wantReliable(t, tr)
	wantBlocks(t, turn(t, tr), 1)
	// The announcement was for one time.
	reload(t, tr, dsync(third, testSize/512))
	wantUnreliable(t, tr, "replaced")
	if found, err := Open(third); err != nil || found.UUID() != tr.UUID() {
		t.Errorf("open by the device beneath: %v, %v", found, err)
	}
}

func TestAGrownDeviceBeneathIsFineUntilTheTableGrows(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, testSize+512); err != nil {
		t.Fatal(err)
	}
	need(t)
	below := dmtest.Loop(t, 0, dmtest.LoopOptions{File: file})
	tr := track(t, below)
	write(t, tr, 1)
	if err := os.Truncate(file, 2*testSize); err != nil {
		t.Fatal(err)
	}
	f := openDevice(t, below, os.O_RDONLY)
	if _, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	if tr.Size() != testSize+512 {
		t.Errorf("%d bytes", tr.Size())
	}
	reload(t, tr, dsync(below, 2*testSize/512))
	wantReliable(t, tr)
	grown, err := Open(below)
	if err != nil || grown.Size() != 2*testSize || grown.UUID() != tr.UUID() {
		t.Fatalf("%+v, %v", grown, err)
	}
	b := turn(t, grown)
	want := kernel.NewBitmap(2 * testBlocks)
	want.Set(1)
	want.SetRange(testBlocks, 2*testBlocks-1) // the first of which was short
	if fmt.Sprint(b.Extents(2*testSize)) != fmt.Sprint(want.Extents(2*testSize)) {
		t.Errorf("marked %v", b.Extents(2*testSize))
	}
	// An epoch that is pending keeps its size.
	write(t, grown, 3)
	rotate(t, grown)
	reload(t, grown, dsync(below, testSize/512))
	p, err := grown.Pending(noContext)
	if err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, p.Bitmap, 3)
}

func TestARenamedDeviceIsFound(t *testing.T) {
	tr := newTracked(t)
	dmtest.RemoveAtEnd(t, "renamed")
	if err := devmapper.Rename(t.Context(), tr.name, "renamed"); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	if tr.Device() != "/dev/mapper/renamed" {
		t.Errorf("its node is %s", tr.Device())
	}
	write(t, tr, 1)
	wantBlocks(t, turn(t, tr), 1)
	if err := devmapper.Resume(t.Context(), "renamed", devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	if err := tr.Stop(noContext); err != nil {
		t.Fatal(err)
	}
}

func TestADeviceThatWasMadeByHandIsNotRemoved(t *testing.T) {
	below := newLoop(t, testSize)
	path := dmtest.Map(t, "by-hand", dsync(below, testSize/512))
	tr, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	wantReliable(t, tr)
	wantErr(t, tr.Stop(noContext), "was not made by", "dmsetup")
	wantReliable(t, tr)
}

func TestClearFromTheShellCannotBeBridged(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 1)
	turn(t, tr)
	write(t, tr, 2)
	if err := os.WriteFile(filepath.Join(tr.dir, "blocks"), []byte("clear\n"), 0); err != nil {
		t.Fatal(err)
	}
	st := status(t, tr)
	if st.Epoch != 3 || st.DirtyBlocks != 0 {
		t.Errorf("status %+v", st)
	}
}
