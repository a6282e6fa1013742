// SPDX-License-Identifier: BSD-2-Clause

package local_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"golang.org/x/sys/unix"
)

var ctx = context.Background()

func created(t testing.TB, dir string) *local.Backend {
	t.Helper()
	be := open(t, dir)
	t.Cleanup(func() { be.Close() })
	if err := be.Create(ctx); err != nil {
		t.Fatal(err)
	}
	return be
}

// smallDisks mounts file systems of 16 MiB; the tests need root.
var smallDisks = map[string]func(t *testing.T, dir string){
	"tmpfs": func(t *testing.T, dir string) {
		mount(t, dir, "-t", "tmpfs", "-o", "size=16m", "tmpfs")
	},
	"ext4": func(t *testing.T, dir string) {
		image := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, 16<<20); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("mkfs.ext4", "-q", image).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.ext4: %v\n%s", err, out)
		}
		mount(t, dir, "-o", "loop", image) // the loop device goes with the mount
	},
}

func mount(t *testing.T, dir string, args ...string) {
	t.Helper()
	if out, err := exec.Command("mount", append(args, dir)...).CombinedOutput(); err != nil {
		t.Fatalf("mount (needs root): %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// strangers lists the files that are no files of the repository.
func strangers(t testing.TB, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.Contains(e.Name(), "-tmp-") {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestAFullDiskIsOnePermanentErrorAndLeavesNothing(t *testing.T) {
	for name, disk := range smallDisks {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			disk(t, dir)
			repo := filepath.Join(dir, "repo")
			be, r := created(t, repo), backendtest.Rand(t)
			kept := map[backend.Handle][]byte{}
			var full error
			for full == nil && len(kept) < 64 {
				data := backendtest.Bytes(r, 1<<20)
				h := backendtest.HandleOf(backend.PackFile, data)
				if full = be.Save(ctx, h, data); full == nil {
					kept[h] = data
				}
			}
			if !errors.Is(full, backend.ErrPermanent) || !errors.Is(full, syscall.ENOSPC) || strings.Contains(full.Error(), "\n") {
				t.Errorf("error of the full disk after %d files: %v", len(kept), full)
			}
			t.Log(full)
			if s := strangers(t, repo); len(s) != 0 {
				t.Errorf("left behind: %v", s)
			}
			files, err := backendtest.List(ctx, be, backend.PackFile)
			if err != nil || len(files) != len(kept) || len(kept) == 0 {
				t.Errorf("%d files are listed and %d were saved, error %v", len(files), len(kept), err)
			}
			for h := range kept {
				if err := be.Remove(ctx, h); err != nil {
					t.Errorf("remove from the full disk: %v", err)
				}
				break
			}
			data := backendtest.Bytes(r, 1<<19)
			if err := be.Save(ctx, backendtest.HandleOf(backend.PackFile, data), data); err != nil {
				t.Errorf("save after room was made: %v", err)
			}
		})
	}
}

func TestAReadOnlyDiskIsPermanent(t *testing.T) {
	dir := t.TempDir()
	smallDisks["tmpfs"](t, dir)
	be := created(t, dir)
	h := backendtest.HandleOf(backend.KeyFile, []byte("x"))
	if err := be.Save(ctx, h, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{be.Save(ctx, h, []byte("x")), be.Remove(ctx, h)} {
		if !errors.Is(err, backend.ErrPermanent) || !errors.Is(err, syscall.EROFS) {
			t.Errorf("got %v", err)
		}
	}
	if _, err := backendtest.Load(ctx, be, h, 0, 0); err != nil {
		t.Errorf("load: %v", err)
	}
}

// TestADiskInUseIsNeverMistakenForItsMountPoint unmounts the disk: while the
// store is open that is refused, and if it is forced (lazily), the store goes
// on with that disk and never sees what lies below.
func TestADiskInUseIsNeverMistakenForItsMountPoint(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatalf("mount (needs root): %v", err)
	}
	defer syscall.Unmount(dir, unix.MNT_DETACH) //nolint:errcheck // unless the test did
	be := created(t, dir)
	if err := syscall.Unmount(dir, 0); !errors.Is(err, syscall.EBUSY) {
		t.Fatalf("unmount of the disk in use: %v", err)
	}
	if err := syscall.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	h := backendtest.HandleOf(backend.PackFile, []byte("x"))
	if err := be.Save(ctx, h, []byte("x")); err != nil {
		t.Errorf("save: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("below the mount point there are %v, error %v", entries, err)
	}
}

func TestARemovedDirectoryIsNoMissingFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	be := created(t, dir)
	h := backendtest.HandleOf(backend.PackFile, []byte("x"))
	if err := be.Save(ctx, h, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	_, load := backendtest.Load(ctx, be, h, 0, 0)
	_, stat := be.Stat(ctx, h)
	_, list := backendtest.List(ctx, be, h.Type)
	for _, err := range []error{load, stat, list, be.Save(ctx, h, []byte("x")), be.Remove(ctx, h)} {
		if !errors.Is(err, backend.ErrNoStore) || errors.Is(err, backend.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is back: %v", err)
	}
}

func TestMissingFoldersAreMadeOnDemand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	be := created(t, dir)
	for _, gone := range []string{"data", "locks"} {
		if err := os.RemoveAll(filepath.Join(dir, gone)); err != nil {
			t.Fatal(err)
		}
	}
	for _, ft := range []backend.FileType{backend.PackFile, backend.LockFile} {
		h := backendtest.HandleOf(ft, []byte("x"))
		if err := be.Save(ctx, h, []byte("x")); err != nil {
			t.Errorf("save: %v", err)
		}
		if got, err := backendtest.Load(ctx, be, h, 0, 0); err != nil || string(got) != "x" {
			t.Errorf("load: %q, %v", got, err)
		}
	}
}

func TestAFileInTheWayIsPermanent(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, filepath.Join(file, "repo")} {
		be, err := local.Open(path, local.Options{})
		if err == nil {
			err = be.Create(ctx)
		}
		if !errors.Is(err, backend.ErrPermanent) || !errors.Is(err, syscall.ENOTDIR) {
			t.Errorf("store at %s: %v", path, err)
		}
	}
}

// TestModesAreRestics compares with what restic init makes, for a repository
// of one user and for one that a group shares.
func TestModesAreRestics(t *testing.T) {
	for _, group := range []bool{false, true} {
		dir := filepath.Join(t.TempDir(), "repo")
		cmd := exec.Command("/usr/bin/restic", "--no-cache", "-r", dir, "init")
		cmd.Env = append(os.Environ(), "RESTIC_PASSWORD=x")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("restic init: %v\n%s", err, out)
		}
		ours := filepath.Join(t.TempDir(), "repo")
		be := created(t, ours)
		for path, mode := range modes(t, dir) {
			if got := modes(t, ours)[path]; mode.IsDir() && got != mode {
				t.Errorf("folder %s has mode %v, restic's has %v", path, got, mode)
			}
		}
		want := fs.FileMode(0o400)
		if group {
			if err := os.Chmod(filepath.Join(dir, "config"), 0o440); err != nil {
				t.Fatal(err)
			}
			want = 0o440
			be = open(t, dir)
			defer be.Close()
			ours = dir
		}
		h := backendtest.HandleOf(backend.IndexFile, nil)
		if err := be.Save(ctx, h, nil); err != nil {
			t.Fatal(err)
		}
		if got := modes(t, ours)["index/"+h.Name]; got != want {
			t.Errorf("a file has mode %v, want %v", got, want)
		}
	}
}

func modes(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	m := map[string]fs.FileMode{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			rel, _ := filepath.Rel(dir, path)
			m[rel] = fi.Mode()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}
