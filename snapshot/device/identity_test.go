// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

func identity(t *testing.T, path string) Identity {
	t.Helper()
	id, err := open(t, path, Options{}).Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// blkid asks the reference tool for one value of a device.
func blkid(t *testing.T, path, tag string) string {
	t.Helper()
	return looptest.Run(t, "blkid", "-p", "-s", tag, "-o", "value", path)
}

func TestSuperblocksAreReadAsBlkidReadsThem(t *testing.T) {
	image := looptest.File(t, looptest.MinSize)
	dev := looptest.Attach(t, image)
	for _, fsType := range []string{"ext4", "xfs", "btrfs", "swap"} {
		looptest.Run(t, "wipefs", "-a", "-q", dev)
		looptest.Mkfs(t, fsType, dev)
		id := identity(t, dev)
		if id.FSType != blkid(t, dev, "TYPE") || id.FSUUID != blkid(t, dev, "UUID") || id.FSType != fsType {
			t.Errorf("%s: got %s %s", fsType, id.FSType, id.FSUUID)
		}
		if id.Kind != Block || id.LoopFile != image || id.DiskSeq == 0 {
			t.Errorf("%s: identity %+v", fsType, id)
		}
		if f := identity(t, image); f.FSUUID != id.FSUUID || f.Kind != File {
			t.Errorf("image file: %+v", f)
		}
	}
}

func TestOlderExtVersionsAreToldApart(t *testing.T) {
	for _, v := range []string{"ext2", "ext3"} {
		image := looptest.File(t, 16*mib)
		looptest.Run(t, "mkfs.ext4", "-q", "-F", "-t", v, image)
		if got, want := identity(t, image).FSType, blkid(t, image, "TYPE"); got != want || got != v {
			t.Errorf("got %s, blkid says %s", got, want)
		}
	}
}

// Headers as their specifications lay them out, where the machine has no tool
// that writes them; blkid judges them too.
func TestHeadersOfVolumesAreReadAsBlkidReadsThem(t *testing.T) {
	luks := make([]byte, mib)
	copy(luks, "LUKS\xba\xbe\x00\x01")
	copy(luks[168:], "7c3e7b5e-2f4a-4b0e-9f57-0c7fbb0f6a11")
	image := looptest.File(t, 4*mib)
	put(t, image, luks, 0)
	id := identity(t, image)
	if id.FSType != blkid(t, image, "TYPE") || id.FSUUID != blkid(t, image, "UUID") || id.FSType != "crypto_LUKS" {
		t.Errorf("LUKS: %+v", id)
	}
	lvm := make([]byte, 4096)
	copy(lvm[512:], "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00LVM2 001")
	copy(lvm[512+32:], "abcdefGHIJKLMNOPQRSTUVWXYZ012345")
	if sig, ok := probe(lvm); !ok || sig != (signature{"LVM2_member", "abcdef-GHIJ-KLMN-OPQR-STUV-WXYZ-012345"}) {
		t.Errorf("LVM: %+v", sig)
	}
}

func TestPartitionsAreIdentifiedAsBlkidDoes(t *testing.T) {
	parts := []looptest.Partition{{Start: 2048, Sectors: 8192}, {Start: 16384, Sectors: 4096}}
	const size = 32 * mib
	tables := map[string]func(t *testing.T, path string){
		"MBR": func(t *testing.T, path string) { looptest.WriteMBR(t, path, 0x1234abcd, parts...) },
		"GPT": func(t *testing.T, path string) { looptest.WriteGPT(t, path, size, 3, parts...) },
	}
	for name, write := range tables {
		t.Run(name, func(t *testing.T) {
			image := looptest.File(t, size)
			write(t, image)
			disk := looptest.Attach(t, image)
			if got, want := identity(t, disk).PTUUID, blkid(t, disk, "PTUUID"); got != want || got == "" {
				t.Errorf("table %q, want %q", got, want)
			}
			for i, p := range parts {
				part := looptest.AddPartition(t, disk, i+1, p)
				id := identity(t, part)
				if want := blkid(t, part, "PART_ENTRY_UUID"); id.PartUUID != want || want == "" {
					t.Errorf("partition %d: %q, want %q", i+1, id.PartUUID, want)
				}
				if id.PTUUID != blkid(t, disk, "PTUUID") || id.PartitionStart != int64(p.Start) {
					t.Errorf("partition %d: %+v", i+1, id)
				}
			}
		})
	}
}

func TestIdentityOfDeviceMapperAndDisksComesFromSysfs(t *testing.T) {
	s := fakeSystem(t)
	s.device(t, "254:3", "virtual/block/dm-3", map[string]string{
		"dm/uuid": "LVM-abc", "dm/name": "vg-data", "diskseq": "77",
	})
	s.device(t, "8:16", "pci/block/sdb", map[string]string{
		"device/model": "Fast Disk  ", "device/wwid": "naa.5000", "device/vpd_pg80": "\x00\x80\x00\x06 S/N42trailing", "dev": "8:16",
	})
	var dm, disk Identity
	if err := s.identify(t.Context(), MakeNumber(254, 3), &dm); err != nil {
		t.Fatal(err)
	}
	if want := (Identity{DMUUID: "LVM-abc", DMName: "vg-data", DiskSeq: 77}); dm != want {
		t.Errorf("device-mapper: %+v, want %+v", dm, want)
	}
	if err := s.identify(t.Context(), MakeNumber(8, 16), &disk); err != nil {
		t.Fatal(err)
	}
	if want := (Identity{Model: "Fast Disk", WWID: "naa.5000", Serial: "S/N42"}); disk != want {
		t.Errorf("disk: %+v, want %+v", disk, want)
	}
}

func TestIdentityKeepsThroughJSON(t *testing.T) {
	want := Identity{Kind: Block, PartUUID: "p", DiskSeq: 3, PartitionStart: 2048}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Identity
	if err := json.Unmarshal(b, &got); err != nil || got != want || strings.Contains(string(b), "serial") {
		t.Fatalf("%s: %+v %v", b, got, err)
	}
}

// fakeSystem is a sysfs of devices that this machine cannot have.
func fakeSystem(t *testing.T) system {
	root := t.TempDir()
	return system{sys: filepath.Join(root, "sys"), proc: filepath.Join(root, "proc"), dev: filepath.Join(root, "dev"), run: filepath.Join(root, "run")}
}

func (s system) device(t *testing.T, number, path string, attrs map[string]string) {
	t.Helper()
	dir := filepath.Join(s.sys, "devices", path)
	attrs["dev"] = number
	for name, value := range attrs {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s.link(t, dir, filepath.Join(s.sys, "dev/block", number))
}

func (s system) link(t *testing.T, target, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}
