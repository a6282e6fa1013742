// SPDX-License-Identifier: BSD-2-Clause

package local_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/layout"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"golang.org/x/sys/unix"
)

// TestABrokenDiskIsPermanentAndGivesTheRest cuts off the end of the file below
// a loop device, in the middle of a pack on it: the kernel answers reads behind
// that with an error, as those of bad sectors.
func TestABrokenDiskIsPermanentAndGivesTheRest(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 32<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-O", "^has_journal", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	dir := t.TempDir()
	mount(t, dir, "-o", "loop", image)
	plain := created(t, filepath.Join(dir, "repo"))
	data := backendtest.Bytes(backendtest.Rand(t), 8<<20)
	h := backendtest.HandleOf(backend.PackFile, data)
	if err := plain.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	cutInTheMiddle(t, image, data)
	dropCache(t, filepath.Join(dir, "repo", layout.Path(h)))

	be := retry.New(plain, retry.Options{Budget: 1, FirstWait: 1, MaxWait: 1})
	calls := 0
	err := be.Load(ctx, h, 0, 0, func(r io.Reader) error {
		calls++
		if _, err := io.Copy(io.Discard, r); err != nil {
			return errors.New("fn says it in its own words")
		}
		return nil
	})
	if !errors.Is(err, backend.ErrBroken) || !errors.Is(err, backend.ErrPermanent) || !errors.Is(err, syscall.EIO) || calls != 1 {
		t.Errorf("load was tried %d times, error %v", calls, err)
	}
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("not one line: %q", err)
	}
	got, err := backendtest.Load(ctx, be, h, 1<<20, 0)
	if err != nil || !bytes.Equal(got, data[:1<<20]) {
		t.Errorf("load of a good part: %v", err)
	}
}

// cutInTheMiddle truncates the image in the second half of where data lies.
func cutInTheMiddle(t *testing.T, image string, data []byte) {
	t.Helper()
	raw, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	middle := len(data) / 4 * 3
	at := bytes.Index(raw, data[middle:middle+4096])
	if at < 0 {
		t.Fatal("the data are not in the image")
	}
	if err := os.Truncate(image, int64(at)); err != nil {
		t.Fatal(err)
	}
}

func dropCache(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}
