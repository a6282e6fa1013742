// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// experiment is something that happens to a device while nobody tracks it.
type experiment struct {
	name string
	do   func(t *testing.T, i image) image // gives the image that it leaves
	// seen is whether the fingerprint must tell; where it need not, content must
	// be unchanged, unless behind says that the write went behind the back of
	// the file system.
	seen, behind bool
}

func in(do func(t *testing.T, i image)) func(*testing.T, image) image {
	return func(t *testing.T, i image) image { do(t, i); return i }
}

func mounted(options string, do func(t *testing.T, dir string)) func(*testing.T, image) image {
	return in(func(t *testing.T, i image) {
		i.with(options, func(dir string) {
			if do != nil {
				do(t, dir)
			}
		})
	})
}

// cut is a power cut at the end of do: the image as it is then.
func cut(options string, do func(t *testing.T, dir string)) func(*testing.T, image) image {
	return func(t *testing.T, i image) image {
		var left image
		i.with(options, func(dir string) {
			do(t, dir)
			left = i.copy()
		})
		return left
	}
}

// onLoop mounts a writable device, on which a read-only mount may write.
func onLoop(options string) func(*testing.T, image) image {
	return in(func(t *testing.T, i image) {
		i.loop(func(device string) {
			_, unmount := i.mount(device, options)
			unmount()
		})
	})
}

func command(args ...string) func(*testing.T, image) image {
	return in(func(t *testing.T, i image) {
		// The checkers' exit status says that they repaired something.
		if out, err := tryRun(args[0], append(args[1:], i.path)...); err != nil && !strings.Contains(args[0], "fsck") {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	})
}

func nothing(*testing.T, string) {}

func overwrite(t *testing.T, dir string) {
	t.Helper()
	run(t, "dd", "if=/dev/urandom", "of="+filepath.Join(dir, "file"), "bs=4096", "count=1", "seek=7", "conv=notrunc", "oflag=direct", "status=none")
}

// touch changes one byte through a mapping.
func touch(t *testing.T, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	m[100] ^= 1
	if err := errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m)); err != nil {
		t.Fatal(err)
	}
}

func remove1(t *testing.T, dir string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, "folder/one")); err != nil {
		t.Fatal(err)
	}
}

func trim(t *testing.T, dir string) {
	t.Helper()
	run(t, "fstrim", dir)
}

// behind writes a block where a file lies, as dd or a rescue system would.
func behind(t *testing.T, i image) image {
	t.Helper()
	data, err := os.ReadFile(i.path)
	if err != nil {
		t.Fatal(err)
	}
	off := bytes.Index(data, bytes.Repeat([]byte("folder/two"), 2000))
	if off < 0 {
		t.Fatal("the file is not found")
	}
	i.write([]byte("written behind the back"), int64(off)+10000)
	return i
}

// common is what happens to every file system.
var common = []experiment{
	{name: "nothing", do: in(func(*testing.T, image) {})},
	{name: "mounted and unmounted", do: mounted("rw", nil), seen: true},
	{name: "mounted noatime,nodiratime", do: mounted("rw,noatime,nodiratime", nil), seen: true},
	{name: "mounted, a file overwritten", do: mounted("rw", overwrite), seen: true},
	{name: "mounted, a byte written through mmap", do: mounted("rw", touch), seen: true},
	{name: "mounted, a file removed", do: mounted("rw", remove1), seen: true},
	{name: "mounted, fstrim", do: mounted("rw", trim), seen: true},
	{name: "power cut just after the mount", do: cut("rw", nothing), seen: true},
	{name: "power cut after a file was overwritten", do: cut("rw", overwrite), seen: true},
	{name: "mounted read-only, then for writing", do: mounted("ro", func(t *testing.T, dir string) {
		// The loop device of a read-only mount refuses; a writable one is below.
		_, _ = tryRun("mount", "-o", "remount,rw", dir)
	})},
	{name: "mounted read-only on a read-only device", do: mounted("ro", nil)},
	{name: "a block of a file written by dd", do: behind, behind: true},
}

func check(t *testing.T, make func(t testing.TB) image, experiments []experiment) {
	base := make(t)
	key := NewKey()
	before := base.take(key)
	if err := before.Proof(); err != nil {
		t.Fatalf("unmounted: %v", err)
	}
	for _, e := range experiments {
		t.Run(e.name, func(t *testing.T) {
			c := base.copy()
			c.t = t
			left := e.do(t, c)
			err := before.Compare(left.take(key))
			changed := !left.equal(base)
			t.Logf("content changed: %v; compared: %v", changed, err)
			switch {
			case changed && e.behind:
				if err != nil && !strings.Contains(err.Error(), "sample") {
					t.Errorf("a write behind the back was seen: %v; say so in docs/reboots.md", err)
				}
			case changed && err == nil:
				t.Errorf("a change was not seen")
			case e.seen && err == nil:
				t.Errorf("not seen")
			case !e.seen && err != nil:
				t.Errorf("%v", err)
			case !e.seen && changed:
				t.Errorf("the content changed")
			}
		})
	}
}

func extExperiments() []experiment {
	return append([]experiment{
		{name: "mounted read-only on a writable device", do: onLoop("ro")},
		{name: "mounted ro,noload", do: onLoop("ro,noload")},
		{name: "remounted for writing", do: in(func(t *testing.T, i image) {
			i.loop(func(device string) {
				dir, unmount := i.mount(device, "ro")
				run(t, "mount", "-o", "remount,rw", dir)
				unmount()
			})
		}), seen: true},
		// It counts its own write: tracking starts before it.
		{name: "e2fsck -p of a clean one", do: command("fsck.ext4", "-p"), seen: true},
		{name: "e2fsck -n -f", do: command("fsck.ext4", "-n", "-f")},
		{name: "e2fsck -f -p", do: command("fsck.ext4", "-f", "-p"), seen: true},
		{name: "tune2fs -L", do: command("tune2fs", "-L", "label"), seen: true},
		{name: "tune2fs -c", do: command("tune2fs", "-c", "33"), seen: true},
		{name: "e2label", do: in(func(t *testing.T, i image) { run(t, "e2label", i.path, "other") }), seen: true},
		{name: "resize2fs", do: in(func(t *testing.T, i image) {
			i.loop(func(device string) {
				run(t, "fsck.ext4", "-f", "-n", device)
				run(t, "resize2fs", "-f", device, "200M")
			})
		}), seen: true},
		{name: "debugfs -w write", do: in(func(t *testing.T, i image) {
			run(t, "debugfs", "-w", "-R", "write /etc/hostname new", i.path)
		}), seen: true},
		{name: "debugfs -w set_inode_field", do: in(func(t *testing.T, i image) {
			run(t, "debugfs", "-w", "-R", "set_inode_field /file mode 0100600", i.path)
		}), behind: true},
		{name: "debugfs -w zap_block", do: in(func(t *testing.T, i image) {
			run(t, "debugfs", "-w", "-R", "zap_block -f /file 3", i.path)
		}), behind: true},
		{name: "mkfs again, with the same UUID", do: in(func(t *testing.T, i image) {
			uuid := run(t, "blkid", "-p", "-o", "value", "-s", "UUID", i.path)
			run(t, "mkfs.ext4", "-q", "-F", "-U", uuid, i.path)
		}), seen: true},
	}, common...)
}

func TestExt4TellsEveryUse(t *testing.T) {
	check(t, func(t testing.TB) image { return made(t, "mkfs.ext4", "-q", "-F") }, extExperiments())
}

func TestExtVariantsTellEveryUse(t *testing.T) {
	for _, args := range soak([][]string{
		{"mkfs.ext2", "-q", "-F"},
		{"mkfs.ext4", "-q", "-F", "-O", "meta_bg,^resize_inode,orphan_file"},
	},
		[]string{"mkfs.ext3", "-q", "-F"},
		[]string{"mkfs.ext4", "-q", "-F", "-b", "4096"},
		[]string{"mkfs.ext4", "-q", "-F", "-O", "^metadata_csum,^64bit"},
		[]string{"mkfs.ext4", "-q", "-F", "-O", "^has_journal"},
		[]string{"mkfs.ext4", "-q", "-F", "-O", "bigalloc"},
		[]string{"mkfs.ext4", "-q", "-F", "-O", "mmp"},
	) {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			check(t, func(t testing.TB) image { return made(t, args...) }, common)
		})
	}
}

func xfsExperiments() []experiment {
	return append([]experiment{
		// It writes stale headers behind the head of the log.
		{name: "mounted read-only on a writable device", do: onLoop("ro"), seen: true},
		{name: "mounted ro,norecovery", do: onLoop("ro,norecovery")},
		{name: "xfs_repair", do: command("xfs_repair"), seen: true},
		{name: "xfs_repair -n", do: command("xfs_repair", "-n")},
		{name: "xfs_repair -L", do: command("xfs_repair", "-L"), seen: true},
		{name: "xfs_admin -L", do: command("xfs_admin", "-L", "label"), seen: true},
		{name: "xfs_admin -U generate", do: command("xfs_admin", "-U", "generate"), seen: true},
		{name: "grown", do: mounted("rw", func(t *testing.T, dir string) { run(t, "xfs_growfs", "-m", "30", dir) }), seen: true},
		{name: "xfs_db -x", do: in(func(t *testing.T, i image) {
			run(t, "xfs_db", "-x", "-c", "inode 131", "-c", "write core.uid 77", i.path)
		}), behind: true},
		{name: "mkfs again, with the same UUID", do: in(func(t *testing.T, i image) {
			uuid := run(t, "blkid", "-p", "-o", "value", "-s", "UUID", i.path)
			run(t, "mkfs.xfs", "-q", "-f", "-m", "uuid="+uuid, i.path)
		}), seen: true},
	}, common...)
}

func TestXFSTellsEveryUse(t *testing.T) {
	check(t, func(t testing.TB) image { return made(t, "mkfs.xfs", "-q", "-f") }, xfsExperiments())
}

func TestXFSVariantsTellEveryUse(t *testing.T) {
	for _, args := range soak([][]string{
		{"mkfs.xfs", "-q", "-f", "-l", "size=64m,su=256k", "-d", "agcount=2,su=256k,sw=2"},
	},
		[]string{"mkfs.xfs", "-q", "-f", "-b", "size=1024"},
		[]string{"mkfs.xfs", "-q", "-f", "-s", "size=4096"},
		[]string{"mkfs.xfs", "-q", "-f", "-i", "size=1024,nrext64=1"},
		[]string{"mkfs.xfs", "-q", "-f", "-m", "bigtime=0,inobtcount=0,reflink=0,finobt=0"},
	) {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			check(t, func(t testing.TB) image { return made(t, args...) }, common)
		})
	}
}

// TestXFSMountedBeforeAPowerCut is about the one state from which a mount of XFS
// leaves no trace: an earlier one, that ended in a power cut before it changed
// anything, has written what the next one will write.
func TestXFSMountedBeforeAPowerCut(t *testing.T) {
	base := made(t, "mkfs.xfs", "-q")
	for range 3 {
		idle := cut("rw", nothing)(t, base)
		if d := doubtOf(t, idle); !strings.Contains(d, "another mount could leave no trace") {
			t.Errorf("after a mount and a power cut: %q", d)
		}
		if cut("rw", overwrite)(t, idle.copy()).equal(idle) {
			t.Error("nothing was written")
		}
		// Unmounting a read-only one writes a record too, if it can.
		onLoop("ro")(t, base)
		before := base.take(Key{})
		if err := before.Proof(); err != nil {
			t.Errorf("after a read-only mount: %v", err)
		}
		if before.Compare(cut("rw", overwrite)(t, base.copy()).take(Key{})) == nil {
			t.Error("a mount after a read-only one was not seen")
		}
	}
}

// TestXFSLogGoesRound mounts until the log has begun again from its start.
func TestXFSLogGoesRound(t *testing.T) {
	// mkfs makes so small a log only if it believes to be tested itself.
	base := made(t, "env", "TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x",
		"mkfs.xfs", "-q", "-l", "size=20m,su=256k", "-d", "agcount=2")
	around, last := 0, uint32(0)
	seen := map[Digest]bool{}
	for range 16 {
		f := base.take(Key{})
		if err := f.Proof(); err != nil {
			t.Fatal(err)
		}
		if seen[f.Parts[0].Digest] {
			t.Fatal("as it was once before")
		}
		seen[f.Parts[0].Digest] = true
		if c := firstCycle(t, base); c != last {
			around, last = around+1, c
		}
		left := cut("rw", overwrite)(t, base.copy())
		if err := f.Compare(left.take(Key{})); err == nil {
			t.Fatal("a power cut after an overwrite was not seen")
		}
		base.with("rw", func(dir string) { fillMore(t, dir) })
	}
	if around < 2 {
		t.Errorf("the log began %d times", around)
	}
}

// firstCycle is the cycle in which the log's first block was written.
func firstCycle(t *testing.T, i image) uint32 {
	t.Helper()
	f, err := os.Open(i.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head, block := make([]byte, headSize), make([]byte, 8)
	if _, err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(block, parseXFS(span{0, i.size()}, head).log.off); err != nil {
		t.Fatal(err)
	}
	if c := binary.BigEndian.Uint32(block); c != recordMagic {
		return c
	}
	return binary.BigEndian.Uint32(block[4:])
}

// fillMore makes a few MiB of changes in metadata.
func fillMore(t *testing.T, dir string) {
	t.Helper()
	sub, err := os.MkdirTemp(dir, "many")
	if err != nil {
		t.Fatal(err)
	}
	for n := range 3000 {
		if err := os.WriteFile(filepath.Join(sub, strings.Repeat("n", 1+n%100)+itoa(int64(n))), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBytesBehindTheFileSystem finds what lies between the end of a file system
// and that of its device.
func TestBytesBehindTheFileSystem(t *testing.T) {
	for _, mkfs := range []string{"mkfs.ext4", "mkfs.xfs"} {
		t.Run(mkfs, func(t *testing.T) {
			i := made(t, mkfs, "-q")
			run(t, "truncate", "-s", itoa(imageSize+1<<20+512), i.path)
			before := i.take(Key{})
			if err := before.Proof(); err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{imageSize, imageSize + 700001, imageSize + 1<<20 + 511} {
				old := i.flip(off)
				if err := before.Compare(i.take(Key{})); err == nil {
					t.Errorf("byte %d", off)
				}
				i.write(old, off)
			}
			run(t, "truncate", "-s", itoa(imageSize+65<<20), i.path)
			if d := doubtOf(t, i); !strings.Contains(d, "outside of any file system") {
				t.Errorf("%q", d)
			}
		})
	}
}
