// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

func TestEpochsHoldWhatWasWrittenInThem(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 1, 2, testBlocks-1)
	first := rotate(t, tr)
	if first.Position.Tracker != tr.UUID() || first.Position.Epoch != 1 || first.Position.Nonce == (kernel.Nonce{}) {
		t.Errorf("position %s", first.Position)
	}
	wantBlocks(t, first.Bitmap, 1, 2, testBlocks-1)
	ack(t, tr, 1)
	write(t, tr, 2, 100)
	second := rotate(t, tr)
	if second.Position.Epoch != 2 {
		t.Errorf("position %s", second.Position)
	}
	wantBlocks(t, second.Bitmap, 2, 100)
	ack(t, tr, 2)
	wantBlocks(t, turn(t, tr))
	wantReliable(t, tr)
}

func TestRotateWritesThePageCacheOut(t *testing.T) {
	tr := newTracked(t)
	f := openDevice(t, tr.Device(), os.O_RDWR)
	if _, err := f.WriteAt([]byte("dirty"), 7*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
	e := rotate(t, tr)
	wantBlocks(t, e.Bitmap, 7)
	got := alignedBuffer(kernel.BlockSize)
	if _, err := openDevice(t, tr.Device(), os.O_RDONLY|unix.O_DIRECT).ReadAt(got, 7*kernel.BlockSize); err != nil || string(got[:5]) != "dirty" {
		t.Errorf("a direct read finds %q, %v", got[:5], err)
	}
}

func TestRotateOfASuspendedDeviceDoesNotWait(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 1)
	f := openDevice(t, tr.Device(), os.O_RDWR)
	if err := devmapper.Suspend(t.Context(), tr.name, devmapper.SuspendOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, kernel.BlockSize), 7*kernel.BlockSize); err != nil { // whole: nothing is read
		t.Fatal(err)
	}
	first := rotate(t, tr)
	wantBlocks(t, first.Bitmap, 1)
	wantReliable(t, tr) // a backup asks before the resume
	if err := devmapper.Resume(t.Context(), tr.name, devmapper.ResumeOptions{}); err != nil {
		t.Fatal(err)
	}
	ack(t, tr, 1)
	wantBlocks(t, turn(t, tr), 7)
}

func TestPendingIsKeptUntilAck(t *testing.T) {
	tr := newTracked(t)
	if e, err := tr.Pending(noContext); e != nil || err != nil {
		t.Errorf("pending at the start: %v, %v", e, err)
	}
	write(t, tr, 3)
	e := rotate(t, tr)
	write(t, tr, 4)
	for range 2 {
		p, err := tr.Pending(noContext)
		if err != nil || p == nil || p.Position != e.Position {
			t.Fatalf("pending %v, %v", p, err)
		}
		wantBlocks(t, p.Bitmap, 3)
	}
	if _, err := tr.Rotate(noContext, kernel.NewNonce()); !errors.Is(err, kernel.ErrUnacknowledged) {
		t.Errorf("rotate with an epoch pending: %v", err)
	}
	for _, other := range []uint64{0, 2, 77} {
		ack(t, tr, other)
	}
	if p, err := tr.Pending(noContext); err != nil || p == nil {
		t.Errorf("another epoch's acknowledgement took it: %v, %v", p, err)
	}
	if st := status(t, tr); st.DirtyBlocks != 2 || st.Epoch != 2 {
		t.Errorf("status %+v", st)
	}
	ack(t, tr, 1)
	ack(t, tr, 1) // again is no error
	if p, err := tr.Pending(noContext); p != nil || err != nil {
		t.Errorf("pending after the acknowledgement: %v, %v", p, err)
	}
	wantBlocks(t, turn(t, tr), 4)
}

func TestAKillBetweenRotateAndAckLosesNothing(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 3, 9)
	killChild(t, tr.Below(), "rotated")
	write(t, tr, 4)
	p, err := tr.Pending(noContext)
	if err != nil || p == nil {
		t.Fatalf("pending %v, %v", p, err)
	}
	if p.Position != (kernel.Position{Tracker: tr.UUID(), Epoch: 1, Nonce: childNonce}) {
		t.Errorf("position %s", p.Position)
	}
	wantBlocks(t, p.Bitmap, 3, 9)
	ack(t, tr, 1)
	wantBlocks(t, turn(t, tr), 4)
	wantReliable(t, tr)
}

func TestPeekEndsNothing(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 5)
	for range 2 {
		b, err := tr.Peek(noContext)
		if err != nil {
			t.Fatal(err)
		}
		wantBlocks(t, b, 5)
	}
	e := rotate(t, tr)
	write(t, tr, 6)
	b, err := tr.Peek(noContext)
	if err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, b, 6)
	wantBlocks(t, e.Bitmap, 5)
}

func TestDirtyBlocksCountOnce(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 1, 2, 3)
	rotate(t, tr)
	write(t, tr, 3, 4)
	if st := status(t, tr); st.DirtyBlocks != 4 {
		t.Errorf("%d dirty blocks", st.DirtyBlocks)
	}
}

func TestInvalidateStaysWithItsFirstReason(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 1)
	wantErr(t, tr.Invalidate(noContext, ""), "no reason")
	wantReliable(t, tr)
	if err := tr.Invalidate(noContext, "two\n lines, \\ and ä"); err != nil {
		t.Fatal(err)
	}
	wantUnreliable(t, tr, `two lines, \ and `)
	if err := tr.Invalidate(noContext, "another"); err != nil {
		t.Fatal(err)
	}
	wantUnreliable(t, tr, "two lines")
	wantBlocks(t, turn(t, tr), 1) // it goes on counting
	wantUnreliable(t, tr, "two lines")
	other, err := Open(tr.Device())
	if err != nil {
		t.Fatal(err)
	}
	wantUnreliable(t, other, "two lines")
}

func TestRestartBeginsANewHistoryInUse(t *testing.T) {
	tr := newTracked(t)
	openDevice(t, tr.Device(), os.O_RDWR) // in use
	old, err := Open(tr.Device())
	if err != nil {
		t.Fatal(err)
	}
	third, err := Open(tr.Device())
	if err != nil {
		t.Fatal(err)
	}
	write(t, tr, 1)
	rotate(t, tr)
	write(t, tr, 2)
	if err := tr.Invalidate(noContext, "for the test"); err != nil {
		t.Fatal(err)
	}
	if err := tr.Restart(noContext); err != nil {
		t.Fatal(err)
	}
	if tr.UUID() == old.UUID() {
		t.Error("it kept its UUID")
	}
	wantReliable(t, tr)
	if st := status(t, tr); st.Epoch != 1 || st.DirtyBlocks != 0 {
		t.Errorf("status %+v", st)
	}
	if p, err := tr.Pending(noContext); p != nil || err != nil {
		t.Errorf("pending %v, %v", p, err)
	}
	wantUnreliable(t, old, "begun anew")
	if _, err := old.Rotate(noContext, kernel.NewNonce()); !errors.Is(err, kernel.ErrNotTracked) {
		t.Errorf("the old history was rotated: %v", err)
	}
	// Who comes second takes the new history, and does not end it.
	if err := third.Restart(noContext); err != nil || third.UUID() != tr.UUID() {
		t.Errorf("%s, %v", third.UUID(), err)
	}
	write(t, tr, 3)
	wantBlocks(t, turn(t, tr), 3)
}

func TestAHistoryIsContinuedOnlyFromItsBeginning(t *testing.T) {
	tr := newTracked(t)
	fresh := tr.UUID()
	saved := kernel.NewUUID()
	wantErr(t, tr.Continue(noContext, saved, 1), "continue")
	if err := tr.Continue(noContext, saved, 7); err != nil {
		t.Fatal(err)
	}
	if st := status(t, tr); st.UUID != saved || st.UUID == fresh || st.Epoch != 7 || !st.Reliable {
		t.Errorf("status %+v", st)
	}
	write(t, tr, 1)
	e := rotate(t, tr)
	if e.Position.Tracker != saved || e.Position.Epoch != 7 {
		t.Errorf("position %s", e.Position)
	}
	if err := tr.Continue(noContext, kernel.NewUUID(), 7); !errors.Is(err, unix.EBUSY) {
		t.Errorf("continue a history that has begun: %v", err)
	}
}

func TestMarkMarksWholeBlocks(t *testing.T) {
	tr := newTracked(t)
	for _, e := range []kernel.Extent{{Offset: 1, Length: 1}, {Offset: 3*kernel.BlockSize - 1, Length: 2}, {Offset: testSize - 1, Length: 1}} {
		if err := tr.Mark(noContext, e); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range []kernel.Extent{{Offset: 0, Length: 0}, {Offset: testSize, Length: 1}, {Offset: -1, Length: 1}, {Offset: 0, Length: testSize + 1}} {
		if err := tr.Mark(noContext, e); err == nil {
			t.Errorf("%+v was marked", e)
		}
	}
	wantBlocks(t, turn(t, tr), 0, 2, 3, testBlocks-1)
}

func TestALargeBitmapIsReadWhole(t *testing.T) {
	const blocks = 1 << 28 // 1 TiB, sparse: a bitmap of 32 MiB
	tr := track(t, newLoop(t, blocks*kernel.BlockSize))
	want := []int64{0, 1, 32767, 32768, 1<<23 - 1, 1 << 23, 1<<26 + 12345, blocks - 2, blocks - 1}
	write(t, tr, want...)
	b, err := tr.Peek(noContext)
	if err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, b, want...)
	b = turn(t, tr)
	wantBlocks(t, b, want...)
	if !turn(t, tr).Equal(kernel.NewBitmap(blocks)) {
		t.Error("the next epoch is not clean")
	}
}
