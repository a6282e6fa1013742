// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

func TestTargetsThatMustNotBeOverwrittenAreRefused(t *testing.T) {
	f := newFixture(t, seed(t), 8<<20)
	s := f.first(1)
	try := func(target string, force bool) error {
		_, err := Restore(t.Context(), f.store, Options{Device: s.device, Target: target, Force: force, Changes: ChangesAll})
		return err
	}
	refused := func(t *testing.T, target string, force bool, want error, say string) {
		t.Helper()
		before := f.content(target)
		err := try(target, force)
		if want != nil && !errors.Is(err, want) || err == nil || !strings.Contains(err.Error(), say) || strings.Contains(err.Error(), "\n") {
			t.Fatalf("restore to %s gave: %v", target, err)
		}
		t.Log(err)
		f.same(target, f.content(target), before)
	}
	t.Run("TooSmall", func(t *testing.T) {
		refused(t, f.loop(8<<20-512), true, ErrTooSmall, "8388096 bytes, the snapshot's device has 8388608")
	})
	t.Run("HasData", func(t *testing.T) {
		loop := f.loop(8 << 20)
		refused(t, loop, false, ErrHasData, "--force")
		file := f.newFile()
		f.must(os.WriteFile(file, f.content(loop), 0o600))
		refused(t, file, false, ErrHasData, "--force")
	})
	t.Run("Held", func(t *testing.T) {
		lower := f.loop(9 << 20)
		f.bind(lower)
		refused(t, lower, true, device.ErrInUse, "held by loop")
	})
	t.Run("FileOfLoop", func(t *testing.T) {
		file := f.newFile()
		f.must(os.WriteFile(file, make([]byte, 1<<20), 0o600))
		f.bind(file)
		refused(t, file, true, device.ErrInUse, "held by loop")
	})
	t.Run("Mounted", func(t *testing.T) {
		loop := f.mkfs()
		refused(t, loop, false, ErrHasData, "ext4")
		f.mount(loop)
		refused(t, loop, true, device.ErrInUse, "mounted at")
	})
	t.Run("Claimed", func(t *testing.T) {
		loop := f.loop(8 << 20)
		fd, err := unix.Open(loop, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
		f.must(err)
		defer unix.Close(fd)
		refused(t, loop, true, device.ErrInUse, "claimed")
	})
	t.Run("Repository", func(t *testing.T) {
		refused(t, filepath.Join(f.dir, "config"), true, device.ErrInUse, "inside of the repository")
		link := f.newFile()
		f.must(os.Symlink(f.dir, link))
		if err := try(link+"/data/new", true); !errors.Is(err, device.ErrInUse) {
			t.Error(err)
		}
	})
	t.Run("NoDevice", func(t *testing.T) {
		for _, path := range []string{"/dev/no-such-disk", "/no/such/folder/image", "/dev/null", t.TempDir()} {
			if err := try(path, true); err == nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v", path, err)
			}
		}
		if _, err := os.Lstat("/dev/no-such-disk"); err == nil {
			t.Error("a file was made in /dev")
		}
	})
}

// mkfs makes an ext4 file system on a loop device of 9 MiB.
func (f *fixture) mkfs() string {
	f.Helper()
	path := filepath.Join(f.TempDir(), "ext4")
	f.must(os.WriteFile(path, make([]byte, 9<<20), 0o600))
	loop := f.bind(path)
	if out, err := exec.Command("mkfs.ext4", "-q", loop).CombinedOutput(); err != nil {
		f.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	return loop
}

func (f *fixture) mount(dev string) {
	f.Helper()
	dir := f.TempDir()
	f.must(unix.Mount(dev, dir, "ext4", 0, ""))
	f.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			f.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// tmpfs mounts one of size bytes.
func (f *fixture) tmpfs(size string) string {
	f.Helper()
	dir := f.TempDir()
	f.must(unix.Mount("none", dir, "tmpfs", 0, "size="+size))
	f.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			f.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func TestATargetIsClaimedDuringARestore(t *testing.T) {
	f := newFixture(t, seed(t), 9<<20)
	s := f.first(1)
	loop, dir := f.mkfs(), t.TempDir()
	tried := false
	f.restore(Options{Device: s.device, Target: loop, Force: true, Verify: true, Progress: func(p Progress) {
		if !tried && p.Done > 0 {
			tried = true
			if err := unix.Mount(loop, dir, "ext4", 0, ""); !errors.Is(err, unix.EBUSY) {
				t.Errorf("mounting the target while it was written gave %v", err)
				_ = unix.Unmount(dir, 0)
			}
			if _, err := device.Open(loop, device.Options{Exclusive: true}); !errors.Is(err, device.ErrInUse) {
				t.Errorf("the target could be claimed while it was written: %v", err)
			}
		}
	}})
	if !tried {
		t.Error("there was no progress")
	}
}

func TestAFailingTargetIsSaidToBeIncomplete(t *testing.T) {
	f := newFixture(t, seed(t), 12<<20)
	f.fill(f.image)
	s := f.backup(1, kernel.Extent{Length: 12 << 20})
	for name, target := range map[string]func() string{
		"FileOnFullDisk": func() string { return filepath.Join(f.tmpfs("5m"), "image") },
		"DeviceFails": func() string {
			path := filepath.Join(f.tmpfs("5m"), "disk")
			f.must(os.WriteFile(path, nil, 0o600))
			f.must(os.Truncate(path, 12<<20))
			return f.bind(path)
		},
		// The file system takes the data and promises room that its disk does not have.
		"DiskFailsLater": func() string {
			path := filepath.Join(f.tmpfs("9m"), "disk")
			f.must(os.WriteFile(path, nil, 0o600))
			f.must(os.Truncate(path, 40<<20))
			return filepath.Join(f.ext4(f.bind(path)), "image")
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := target()
			_, err := Restore(t.Context(), f.store, Options{Device: s.device, Target: path, Force: true})
			if !errors.Is(err, ErrIncomplete) || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
				t.Fatalf("restore gave: %v", err)
			}
			if strings.Contains(err.Error(), "\n") || strings.Count(err.Error(), path) != 1 {
				t.Errorf("not one line that names the target once: %v", err)
			}
			t.Log(err)
		})
	}
}

// TestAFileIsNotLeftInThePageCache restores more than what a file's window holds.
func TestAFileIsNotLeftInThePageCache(t *testing.T) {
	const size = 2 * paceWindow
	f := newFixture(t, seed(t), size)
	f.fill(f.image)
	s := f.backup(1, kernel.Extent{Length: size})
	path := f.newFile()
	f.restore(Options{Device: s.device, Target: path})
	file, err := os.Open(path)
	f.must(err)
	defer file.Close()
	mapped, err := unix.Mmap(int(file.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	f.must(err)
	defer func() { f.must(unix.Munmap(mapped)) }()
	pages := make([]byte, size/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), size, uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		t.Fatal(errno)
	}
	// The kernel may be busy with a page just when it is to forget it.
	if n := bytes.Count(pages, []byte{1}); n > len(pages)/20 {
		t.Errorf("%d of %d pages are in memory", n, len(pages))
	}
	f.same("the file", f.content(path), s.image)
}

func TestAFileSystemWithoutDirectWritesWillDo(t *testing.T) {
	f := newFixture(t, seed(t), 8<<20+5)
	s := f.first(1)
	path := filepath.Join(f.tmpfs("32m"), "image")
	for range 2 { // a new file, then one with data
		f.restore(Options{Device: s.device, Target: path, Force: true, Verify: true, Changes: ChangesAll})
		f.same("the file", f.content(path), s.image)
	}
}

func TestZerosAreMadeInEveryWay(t *testing.T) {
	f := newFixture(t, seed(t), 4096)
	file := f.newFile()
	f.must(os.WriteFile(file, f.content(f.loop(8<<20)), 0o600))
	for kind, path := range map[string]string{"block": f.loop(8 << 20), "file": file} {
		for way, name := range []string{"punch", "range", "write"} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				garbage := make([]byte, 8<<20)
				f.fill(garbage)
				f.must(os.WriteFile(path, garbage, 0o600))
				tg, err := inspect(t.Context(), path, 8<<20, "", true)
				f.must(err)
				defer tg.close()
				f.must(tg.claim())
				f.must(tg.prepare(8<<20, true))
				tg.zeroing.Store(int32(way))
				e := kernel.Extent{Offset: 3 * 4096, Length: 1357 * 4096}
				f.must(tg.zero(t.Context(), e))
				f.must(tg.sync())
				if got := tg.zeroing.Load(); got != int32(way) {
					t.Errorf("%s gave way to another way", name)
				}
				clear(garbage[e.Offset:e.End()])
				f.same(path, f.content(path), garbage)
			})
		}
	}
}

func TestZerosTakeNoSpace(t *testing.T) {
	f := newFixture(t, seed(t), 64<<20)
	f.fill(f.image[30<<20 : 31<<20])
	s := f.backup(1, kernel.Extent{Length: 64 << 20})
	space := func(path string) int64 {
		var st unix.Stat_t
		f.must(unix.Stat(path, &st))
		return st.Blocks * 512
	}
	file := f.newFile()
	f.restore(Options{Device: s.device, Target: file})
	disk := filepath.Join(f.TempDir(), "disk")
	garbage := make([]byte, 64<<20)
	f.fill(garbage)
	f.must(os.WriteFile(disk, garbage, 0o600))
	f.restore(Options{Device: s.device, Target: f.bind(disk), Force: true, Changes: ChangesAll})
	for _, path := range []string{file, disk} {
		if n := space(path); n > 2<<20 {
			t.Errorf("%s takes %d bytes for 1 MiB of data", path, n)
		}
		f.same(path, f.content(path), s.image)
	}
}

// ours are the goroutines that run code of this package.
func ours() (out []string) {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "dsync-backup/restore.") && !strings.Contains(g, "testing.tRunner") {
			out = append(out, g)
		}
	}
	return out
}

func TestCancellationEndsEverything(t *testing.T) {
	f := newFixture(t, seed(t), 16<<20)
	f.fill(f.image)
	s := f.backup(1, kernel.Extent{Length: 16 << 20})
	at := func(n int64, fn func(ctx context.Context, tell func(Progress)) error) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		return fn(ctx, func(p Progress) {
			if p.Done >= n {
				cancel()
			}
		})
	}
	small := limits{8, 2, 1 << 20, 0}
	for _, n := range []int64{0, 1, 5 << 20} {
		loop := f.loop(16 << 20)
		for _, how := range []Changes{ChangesAll, ChangesCompare} {
			err := at(n, func(ctx context.Context, tell func(Progress)) error {
				_, err := Restore(ctx, f.store, Options{Device: s.device, Target: loop, Changes: how, Force: true, Progress: tell, limits: small})
				return err
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("restore cancelled after %d bytes gave %v", n, err)
			}
			// A comparison may have written nothing yet.
			if n > 0 && how == ChangesAll && !errors.Is(err, ErrIncomplete) {
				t.Errorf("restore cancelled after %d bytes does not say that the target is incomplete: %v", n, err)
			}
		}
		err := at(n, func(ctx context.Context, tell func(Progress)) error {
			_, err := Dump(ctx, f.store, io.Discard, DumpOptions{Device: s.device, Progress: tell, limits: small})
			return err
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("dump cancelled after %d bytes gave %v", n, err)
		}
		err = at(n, func(ctx context.Context, tell func(Progress)) error {
			_, err := Verify(ctx, f.store, VerifyOptions{Device: s.device, Target: loop, Progress: tell})
			return err
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("verify cancelled after %d bytes gave %v", n, err)
		}
	}
	for range 100 {
		if len(ours()) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("left running:\n%s", strings.Join(ours(), "\n\n"))
}
