// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// TestAHistoryIsContinuedOnlyFromItsBeginning: a tracker in which an epoch has ended, or
// that missed something, does not take up another history; one that does keeps what
// it has marked, and another process that still goes by its old UUID is told.
func TestAHistoryIsContinuedOnlyFromItsBeginning(t *testing.T) {
	device, _ := newLoop(t, 8<<20)
	start := func() *Tracker {
		t.Helper()
		tr, err := Start(t.Context(), device, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	writeBlock := func(i int64) {
		t.Helper()
		f := openDevice(t, device, os.O_RDWR)
		_, err := f.WriteAt([]byte("written"), i*kernel.BlockSize)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	tr := start()
	other, err := Open(device)
	if err != nil {
		t.Fatal(err)
	}
	writeBlock(3)
	saved := kernel.NewUUID()
	if err := tr.Continue(t.Context(), saved, 1); err == nil {
		t.Error("epoch 1 follows none")
	}
	if err := tr.Continue(t.Context(), saved, 8); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Rotate(t.Context(), kernel.NewNonce()); !errors.Is(err, kernel.ErrNotTracked) {
		t.Errorf("rotated by its old UUID: %v", err)
	}
	if st, err := other.Status(t.Context()); err != nil || st.Reliable {
		t.Errorf("by its old UUID: %+v, %v", st, err)
	}
	e, err := tr.Rotate(t.Context(), kernel.NewNonce())
	if err != nil || e.Position.Tracker != saved || e.Position.Epoch != 8 || !e.Bitmap.Get(3) {
		t.Fatalf("%+v, %v", e, err)
	}
	if st, err := tr.Status(t.Context()); err != nil || !st.Reliable || st.UUID != saved || st.Epoch != 9 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := tr.Continue(t.Context(), kernel.NewUUID(), 20); err == nil {
		t.Error("continued twice")
	}
	writeBlock(4)
	if why, err := tr.StopQuiet(t.Context()); err != nil || !strings.Contains(why, "were written") {
		t.Errorf("%q, %v", why, err)
	}

	tr = start()
	if err := tr.Invalidate(t.Context(), "it was told so"); err != nil {
		t.Fatal(err)
	}
	if err := tr.Continue(t.Context(), saved, 9); err == nil || !strings.Contains(err.Error(), "told so") {
		t.Errorf("%v", err)
	}
	if err := tr.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	tr = start()
	if why, err := tr.StopQuiet(t.Context()); err != nil || why != "" {
		t.Errorf("%q, %v", why, err)
	}
}
