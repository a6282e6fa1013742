// SPDX-License-Identifier: BSD-2-Clause

package local_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/layout"
)

// TestWhatWasSavedSurvivesAPowerFailure copies the image below a mounted ext4
// after each call: the copy holds what has reached the disk, and nothing that
// only the file system's memory knows. All that was saved must be in it, and
// what was removed must not. The mount options keep ext4 from writing early.
func TestWhatWasSavedSurvivesAPowerFailure(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	dir := t.TempDir()
	mount(t, dir, "-o", "loop,commit=300,noauto_da_alloc", image)
	repo := filepath.Join(dir, "a", "repo")
	be, r := open(t, repo), backendtest.Rand(t)
	defer be.Close()
	if err := be.Create(ctx); err != nil {
		t.Fatal(err)
	}
	want := map[backend.Handle][]byte{}
	check := func(what string) { t.Run(what, func(t *testing.T) { checkAfterPowerFailure(t, image, want) }) }
	check("create")
	for _, ft := range append([]backend.FileType{backend.ConfigFile}, backendtest.Types...) {
		data := backendtest.Bytes(r, r.IntN(1<<20))
		h := backendtest.HandleOf(ft, data)
		if err := be.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		want[h] = data
		check("save " + ft.String())
		if ft == backend.IndexFile {
			if err := be.Remove(ctx, h); err != nil {
				t.Fatal(err)
			}
			delete(want, h)
			check("remove")
		}
	}
}

// checkAfterPowerFailure mounts a copy of the image, which replays its
// journal, and compares the repository in it.
func checkAfterPowerFailure(t *testing.T, image string, want map[backend.Handle][]byte) {
	t.Helper()
	after := filepath.Join(t.TempDir(), "after")
	if out, err := exec.Command("cp", "--sparse=always", image, after).CombinedOutput(); err != nil {
		t.Fatalf("copy the image: %v\n%s", err, out)
	}
	dir := t.TempDir()
	mount(t, dir, "-o", "loop", after)
	be := open(t, filepath.Join(dir, "a", "repo"))
	defer be.Close()
	for _, folder := range layout.Dirs() {
		if _, err := os.Stat(filepath.Join(be.Location(), folder)); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for _, ft := range append([]backend.FileType{backend.ConfigFile}, backendtest.Types...) {
		files, err := backendtest.List(ctx, be, ft)
		if err != nil {
			t.Fatal(err)
		}
		n += len(files)
	}
	if n != len(want) {
		t.Errorf("there are %d files, want %d", n, len(want))
	}
	for h, data := range want {
		got, err := backendtest.Load(ctx, be, h, 0, 0)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%v: %d of %d bytes are there, error %v", h, len(got), len(data), err)
		}
	}
}
