// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// TestAQuietStopTellsOfWhatWasWritten: a write in the last epoch is told, whenever it came,
// and one who has the device open is in the way, after which all goes on.
func TestAQuietStopTellsOfWhatWasWritten(t *testing.T) {
	tr := newTracked(t)
	write(t, tr, 3)
	turn(t, tr)
	f := openDevice(t, tr.Device(), os.O_RDWR)
	if _, err := tr.StopQuiet(t.Context()); !errors.Is(err, ErrInUse) {
		t.Fatalf("while it is open: %v", err)
	}
	wantReliable(t, tr)
	if _, err := f.WriteAt([]byte("x"), 5*kernel.BlockSize); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, turn(t, tr), 5)
	write(t, tr, 7)
	why, err := tr.StopQuiet(t.Context())
	if err != nil || !strings.Contains(why, "1 blocks were written") {
		t.Fatalf("%q, %v", why, err)
	}
	if _, err := Open(tr.Device()); err == nil {
		t.Error("it is still there")
	}

	tr = newTracked(t)
	write(t, tr, 3)
	turn(t, tr)
	if why, err := tr.StopQuiet(t.Context()); err != nil || why != "" {
		t.Errorf("%q, %v", why, err)
	}
	tr = newTracked(t)
	if err := tr.Invalidate(t.Context(), "it was told so"); err != nil {
		t.Fatal(err)
	}
	if why, err := tr.StopQuiet(t.Context()); err != nil || !strings.Contains(why, "told so") {
		t.Errorf("%q, %v", why, err)
	}
}
