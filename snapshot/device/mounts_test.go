// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

func mountsOf(t *testing.T, path string) []Mount {
	t.Helper()
	ms, err := Mounts(path)
	if err != nil {
		t.Fatal(err)
	}
	return ms
}

// oneMount expects a single file system, which can be opened and is the one
// at dir.
func oneMount(t *testing.T, path, dir string) Mount {
	t.Helper()
	ms := mountsOf(t, path)
	if len(ms) != 1 || ms[0].Path != dir {
		t.Fatalf("mounts of %s: %v, want one at %s", path, ms, dir)
	}
	canOpen(t, ms[0])
	return ms[0]
}

func canOpen(t *testing.T, m Mount) *os.File {
	t.Helper()
	f, err := m.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func numberOf(t *testing.T, path string) Number {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return Number(st.Rdev)
}

func TestMountsAreFoundOncePerFileSystem(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			dev := looptest.Device(t, looptest.MinSize)
			looptest.Mkfs(t, fsType, dev)
			if ms := mountsOf(t, dev); len(ms) != 0 {
				t.Fatalf("not mounted, and found %v", ms)
			}
			dir := looptest.Mount(t, dev)
			if err := os.Mkdir(dir+"/sub dir", 0o755); err != nil {
				t.Fatal(err)
			}
			bind := looptest.Mount(t, dir+"/sub dir", "--bind")
			m := oneMount(t, dev, dir)
			if m.Type != fsType || m.ReadOnly || !slices.Equal(m.Others, []string{bind}) || !slices.Equal(m.Devices, []Number{numberOf(t, dev)}) {
				t.Fatalf("%+v", m)
			}
			// The mount's own flag is not the file system's.
			looptest.Run(t, "mount", "-o", "remount,ro,bind", dir)
			if oneMount(t, dev, dir).ReadOnly {
				t.Fatal("a read-only mount of a file system that is written elsewhere was taken for read-only")
			}
			looptest.Run(t, "mount", "-o", "remount,ro", dir)
			if !oneMount(t, dev, dir).ReadOnly {
				t.Fatal("a read-only file system was taken for read-write")
			}
		})
	}
}

func TestMountsOfSecondBtrfsDeviceAreFound(t *testing.T) {
	a, b := looptest.Device(t, looptest.MinSize), looptest.Device(t, looptest.MinSize)
	looptest.Mkfs(t, "btrfs", a, b)
	looptest.Run(t, "btrfs", "device", "scan", a, b)
	t.Cleanup(func() { looptest.Run(t, "btrfs", "device", "scan", "--forget", a, b) })
	dir := looptest.Mount(t, a)
	looptest.Run(t, "btrfs", "subvolume", "create", dir+"/sub")
	sub := looptest.Mount(t, b, "-o", "subvol=sub")
	for _, dev := range []string{a, b} {
		if m := oneMount(t, dev, dir); !slices.Equal(m.Others, []string{sub}) {
			t.Fatalf("%+v", m)
		}
	}
	image := sub + "/image" // its st_dev is the subvolume's, which mountinfo does not know
	put(t, image, nil, 0)
	if err := os.Truncate(image, 16*mib); err != nil {
		t.Fatal(err)
	}
	loop := looptest.Attach(t, image)
	looptest.Mkfs(t, "ext4", loop)
	top := looptest.Mount(t, loop)
	ms := mountsOf(t, b)
	if len(ms) != 2 || ms[0].Path != dir || ms[1].Path != top || ms[1].Depth != 1 {
		t.Fatalf("stack on a subvolume: %v", ms)
	}
}

func TestMountsOnPartitionsAreFoundFromTheDisk(t *testing.T) {
	disk := looptest.Device(t, 64*mib)
	one := looptest.AddPartition(t, disk, 1, looptest.Partition{Start: 2048, Sectors: 16 * 2048})
	two := looptest.AddPartition(t, disk, 2, looptest.Partition{Start: 20 * 2048, Sectors: 16 * 2048})
	looptest.Mkfs(t, "ext4", one)
	looptest.Mkfs(t, "ext4", two)
	dir := looptest.Mount(t, two)
	oneMount(t, disk, dir)
	oneMount(t, two, dir)
	if ms := mountsOf(t, one); len(ms) != 0 {
		t.Fatalf("the other partition's mounts: %v", ms)
	}
	if use, err := InUse(disk); err != nil || len(use.Claimed)+len(use.Holders) != 0 || !use.ReadWrite() {
		t.Fatalf("%s %v", use, err)
	}
}

// TestStacksOfLoopDevicesAreClimbed: ext4 on a loop device on a loop device on
// a file in an xfs on the device asked for.
func TestStacksOfLoopDevicesAreClimbed(t *testing.T) {
	outer := looptest.Device(t, looptest.MinSize)
	looptest.Mkfs(t, "xfs", outer)
	below := looptest.Mount(t, outer)
	image := below + "/image"
	put(t, image, nil, 0)
	if err := os.Truncate(image, 32*mib); err != nil {
		t.Fatal(err)
	}
	first := looptest.Attach(t, image)
	second := looptest.Attach(t, first)
	looptest.Mkfs(t, "ext4", second)
	top := looptest.Mount(t, second)
	ms := mountsOf(t, outer)
	if len(ms) != 2 || ms[0].Path != below || ms[0].Depth != 0 || ms[1].Path != top || ms[1].Depth != 2 {
		t.Fatalf("%+v", ms)
	}
	use, err := InUse(outer)
	want := []string{filepath.Base(first), filepath.Base(second)}
	slices.Sort(want)
	if err != nil || !slices.Equal(use.Holders, want) {
		t.Fatalf("holders %v, want %v (%v)", use.Holders, want, err)
	}
	oneMount(t, image, top) // the image file is in use by the same mount
}

// inNamespace mounts dev in a mount namespace of its own, which lives as long
// as the test.
func inNamespace(t *testing.T, dev string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mount "$1" "$2" && echo mounted && read wait`, "sh", dev, dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "mounted\n" {
		t.Fatalf("mount in another namespace: %q %v", line, err)
	}
	return dir
}

func TestMountsInOtherNamespacesAreFoundAndOpened(t *testing.T) {
	dev := looptest.Device(t, 32*mib)
	looptest.Mkfs(t, "ext4", dev)
	put(t, t.TempDir()+"/x", nil, 0)
	dir := inNamespace(t, dev)
	f := canOpen(t, oneMount(t, dev, dir))
	names, err := f.Readdirnames(-1)
	if err != nil && err != io.EOF || !slices.Contains(names, "lost+found") {
		t.Fatalf("opened something else: %v %v", names, err)
	}
}

func TestCoveredMountIsReachedElsewhereOrRefused(t *testing.T) {
	dev := looptest.Device(t, 32*mib)
	looptest.Mkfs(t, "ext4", dev)
	dir := looptest.Mount(t, dev)
	looptest.Run(t, "mount", "-t", "tmpfs", "none", dir)
	defer looptest.Run(t, "umount", dir)
	ms := mountsOf(t, dev)
	if len(ms) != 1 {
		t.Fatalf("%v", ms)
	}
	if f, err := ms[0].Open(); err == nil {
		f.Close()
		t.Fatal("opened what covers the mount")
	}
}

func TestHoldersAreClimbedThroughDeviceMapper(t *testing.T) {
	s := fakeSystem(t)
	s.device(t, "8:0", "pci/block/sda", map[string]string{})
	s.device(t, "8:1", "pci/block/sda/sda1", map[string]string{"partition": "1"})
	s.device(t, "9:0", "virtual/block/md0", map[string]string{})
	s.device(t, "254:0", "virtual/block/dm-0", map[string]string{})
	s.device(t, "254:1", "virtual/block/dm-1", map[string]string{})
	s.device(t, "252:0", "virtual/block/bcache0", map[string]string{})
	dir := func(p string) string { return filepath.Join(s.sys, "devices", p) }
	s.link(t, dir("virtual/block/md0"), dir("pci/block/sda/sda1/holders/md0"))
	s.link(t, dir("virtual/block/dm-0"), dir("virtual/block/md0/holders/dm-0"))
	s.link(t, dir("virtual/block/dm-1"), dir("virtual/block/md0/holders/dm-1"))
	s.link(t, dir("virtual/block/dm-1"), dir("virtual/block/dm-0/holders/dm-1"))
	s.link(t, dir("virtual/block/bcache0"), dir("virtual/block/dm-1/bcache/dev"))

	st := &stack{sys: s, depth: map[Number]int{}, dirs: map[Number]string{}, above: map[Number][]Number{}, mounts: map[Number]*Mount{}}
	if err := st.add(MakeNumber(8, 0), 0); err != nil {
		t.Fatal(err)
	}
	want := map[Number]int{
		MakeNumber(8, 0): 0, MakeNumber(8, 1): 0, MakeNumber(9, 0): 1,
		MakeNumber(254, 0): 2, MakeNumber(254, 1): 3, MakeNumber(252, 0): 4,
	}
	for num, depth := range want {
		if got, ok := st.depth[num]; !ok || got != depth {
			t.Errorf("device %s at depth %d (found: %v), want %d", num, got, ok, depth)
		}
	}
	if len(st.depth) != len(want) {
		t.Errorf("found %v", st.depth)
	}
}

func TestMountinfoIsReadAsTheKernelWritesIt(t *testing.T) {
	const text = `36 35 98:0 /mnt1 /mnt\0402\134 rw,noatime master:1 shared:3 - ext3 /dev/root rw,errors=continue
40 35 0:45 /@ /data ro - btrfs /dev/sd\011a ro,subvol=/@
`
	got, err := parseMountinfo(strings.NewReader(text), "self")
	if err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	if e := got[0]; e.id != 36 || e.num != MakeNumber(98, 0) || e.root != "/mnt1" || e.point != `/mnt 2\` || e.fsType != "ext3" || e.readOnly {
		t.Errorf("%+v", e)
	}
	if e := got[1]; !e.num.Anonymous() || e.source != "/dev/sd\ta" || !e.readOnly {
		t.Errorf("%+v", e)
	}
	if _, err := parseMountinfo(strings.NewReader("36 35 98:0 /\n"), "self"); err == nil {
		t.Error("a short line was accepted")
	}
}
