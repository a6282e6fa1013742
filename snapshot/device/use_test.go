// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

// refused expects CheckTarget to refuse with words that tell why.
func refused(t *testing.T, path, words string) {
	t.Helper()
	if err := CheckTarget(path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), words) {
		t.Errorf("check %s: %v, want ErrInUse with %q", path, err, words)
	}
}

func accepted(t *testing.T, path string) {
	t.Helper()
	if err := CheckTarget(path); err != nil {
		t.Errorf("check %s: %v", path, err)
	}
}

func TestTargetsInUseAreRefused(t *testing.T) {
	image := looptest.File(t, 32*mib)
	accepted(t, image)
	accepted(t, image+"-not-there")
	dev := looptest.Attach(t, image)
	accepted(t, dev)
	refused(t, image, "held by "+filepath.Base(dev))
	looptest.Mkfs(t, "ext4", dev)
	t.Run("Mounted", func(t *testing.T) {
		dir := looptest.Mount(t, dev)
		refused(t, dev, dir)
		refused(t, image, dir)
		refused(t, dir+"/../"+filepath.Base(dir)+"/../../../../../.."+dev, dir)
	})
	t.Run("MountedReadOnly", func(t *testing.T) {
		dir := looptest.Mount(t, dev, "-o", "ro")
		refused(t, dev, dir)
		if use, err := InUse(dev); err != nil || use.ReadWrite() {
			t.Errorf("%s %v", use, err)
		}
	})
	t.Run("MountedElsewhere", func(t *testing.T) { refused(t, dev, inNamespace(t, dev)) })
	t.Run("HeldByLoop", func(t *testing.T) {
		refused(t, dev, "held by "+filepath.Base(looptest.Attach(t, dev)))
	})
	t.Run("Claimed", func(t *testing.T) {
		d := open(t, dev, Options{Exclusive: true})
		refused(t, dev, filepath.Base(dev)+" is claimed")
		d.Close()
		accepted(t, dev)
	})
	t.Run("MountedOutOfSight", func(t *testing.T) {
		dir := looptest.Mount(t, dev)
		f, err := os.Create(dir + "/open")
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		refused(t, dev, "is claimed")
		f.Close()
	})
	accepted(t, dev)
}

func TestSwapIsFound(t *testing.T) {
	dev := looptest.Device(t, 32*mib)
	looptest.Mkfs(t, "ext4", dev)
	dir := looptest.Mount(t, dev)
	file := dir + "/swapfile"
	put(t, file, make([]byte, 4*mib), 0)
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	part := looptest.Device(t, 8*mib)
	for _, area := range []string{file, part} {
		looptest.Mkfs(t, "swap", area)
		looptest.Run(t, "swapon", area)
		t.Cleanup(func() { looptest.Run(t, "swapoff", area) })
		refused(t, area, "swap on "+area)
	}
	refused(t, dev, "swap on "+file)
}

func TestExclusiveClaimKeepsOthersOut(t *testing.T) {
	dev := looptest.Device(t, 32*mib)
	looptest.Mkfs(t, "ext4", dev)
	d := open(t, dev, Options{Exclusive: true})
	if _, err := Open(dev, Options{Exclusive: true}); !errors.Is(err, ErrInUse) {
		t.Fatalf("second claim: %v", err)
	}
	if err := exec.Command("mount", dev, t.TempDir()).Run(); err == nil {
		t.Fatal("a claimed device was mounted")
	}
	d.Close()
	dir := looptest.Mount(t, dev)
	if _, err := Open(dev, Options{Exclusive: true}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), dir) {
		t.Fatalf("claim of a mounted device: %v", err)
	}
	open(t, dev, Options{}) // reading needs no claim
}

func TestHasDataSeesWhatAnOverwriteWouldLose(t *testing.T) {
	has := func(path, words string) {
		t.Helper()
		got, err := HasData(t.Context(), path)
		if err != nil || words == "" && got != "" || !strings.Contains(got, words) {
			t.Errorf("%s: %q, want %q (%v)", path, got, words, err)
		}
	}
	image := looptest.File(t, 64*mib)
	dev := looptest.Attach(t, image)
	has(image+"-not-there", "")
	has(image, "")
	has(dev, "")
	put(t, dev, make([]byte, 64*mib), 0) // allocated zeros
	has(dev, "")
	put(t, dev, []byte("x"), 64*mib-5)
	has(dev, "data at byte 67108859")
	has(image, "data at byte 67108859")
	looptest.WriteGPT(t, image, 64*mib, 1, looptest.Partition{Start: 2048, Sectors: 2048})
	has(image, "GPT partition table")
	looptest.WriteMBR(t, image, 1, looptest.Partition{Start: 2048, Sectors: 2048})
	put(t, image, make([]byte, 512), 512)
	has(image, "MBR partition table")
	looptest.Mkfs(t, "ext4", dev)
	has(dev, "ext4")
	has(looptest.File(t, 0), "")
	has(looptest.File(t, 5), "")
}

func TestOnFileSystemFollowsLinksAndPathsNotYetThere(t *testing.T) {
	dev := looptest.Device(t, 32*mib)
	looptest.Mkfs(t, "ext4", dev)
	dir := looptest.Mount(t, dev)
	away := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(dir+"/repo", 0o755))
	must(os.Symlink(dir+"/repo", away+"/link"))
	must(os.Symlink("../"+filepath.Base(filepath.Dir(dir))+"/"+filepath.Base(dir)+"/later/repo", filepath.Dir(dir)+"/dangling"))
	must(os.Symlink(dir+"/later", away+"/dangling"))
	must(os.Symlink(away+"/new", dir+"/out"))
	bind := looptest.Mount(t, dir+"/repo", "--bind")
	mounts := mountsOf(t, dev)
	for path, want := range map[string]bool{
		dir: true, dir + "/repo": true, dir + "/a/b/c": true, bind: true, bind + "/new": true,
		away + "/link": true, away + "/link/new": true, away + "/dangling": true, away + "/dangling/deeper": true,
		filepath.Dir(dir) + "/dangling": true,
		dir + "/out":                    false, away: false, away + "/new": false, "/": false,
	} {
		on, ok, err := LiesOn(path, mounts)
		if err != nil || ok != want || ok && on.Path != dir {
			t.Errorf("%s lies on it: %v (%v), want %v", path, ok, err, want)
		}
	}
	m, err := OnFileSystem(bind + "/new")
	if err != nil || m.Dev != mounts[0].Dev || m.Type != "ext4" {
		t.Errorf("%+v %v", m, err)
	}
}

func TestLiesOnSeesThroughOverlays(t *testing.T) {
	dev := looptest.Device(t, 32*mib)
	looptest.Mkfs(t, "ext4", dev)
	dir := looptest.Mount(t, dev)
	for _, d := range []string{"/upper", "/work", "/lower"} {
		if err := os.Mkdir(dir+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := looptest.Mount(t, "none", "-t", "overlay", "-o", "lowerdir="+t.TempDir()+",upperdir="+dir+"/upper,workdir="+dir+"/work")
	on, ok, err := LiesOn(merged+"/repo", mountsOf(t, dev))
	if err != nil || !ok || on.Path != dir {
		t.Fatalf("%v %v %v", on, ok, err)
	}
}
