// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// signature is what the first bytes of a device claim to be. Types are named
// as libblkid names them.
type signature struct {
	Type string
	UUID string
}

// headSize covers every superblock below but that of btrfs's mirrors and of md
// at the end of the device.
const headSize = 128 << 10

// magics are found at fixed offsets; uuid is the offset of a binary UUID, or
// 0. Sources: the kernel's headers of each file system, LUKS2's on-disk format
// specification, LVM2's lib/format_text, mdadm's superblock v1.
var magics = []struct {
	name   string
	offset int
	magic  string
	uuid   int
}{
	{"xfs", 0, "XFSB", 32},
	{"btrfs", 0x10040, "_BHRfS_M", 0x10020},
	{"swap", 4096 - 10, "SWAPSPACE2", 1024 + 12},
	{"swap", 65536 - 10, "SWAPSPACE2", 1024 + 12},
	{"linux_raid_member", 0, "\xfc\x4e\x2b\xa9", 16},
	{"linux_raid_member", 4096, "\xfc\x4e\x2b\xa9", 4096 + 16},
	{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", 4096 + 40},
	{"f2fs", 1024, "\x10\x20\xf5\xf2", 1024 + 108},
	{"ntfs", 3, "NTFS    ", 0},
	{"exfat", 3, "EXFAT   ", 0},
	{"vfat", 54, "FAT", 0},
	{"vfat", 82, "FAT32", 0},
	{"iso9660", 0x8001, "CD001", 0},
	{"squashfs", 0, "hsqs", 0},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0", 1024 + 48},
	{"ext4", 1024 + 56, "\x53\xef", 1024 + 104},
}

func at(head []byte, off, n int) []byte {
	if off < 0 || n < 0 || off+n > len(head) {
		return nil
	}
	return head[off : off+n]
}

// probe recognises a superblock, with ok=false for none.
func probe(head []byte) (signature, bool) {
	if s, ok := probeText(head); ok {
		return s, true
	}
	for _, m := range magics {
		if string(at(head, m.offset, len(m.magic))) != m.magic {
			continue
		}
		s := signature{Type: m.name}
		if id := at(head, m.uuid, 16); m.uuid != 0 && id != nil {
			s.UUID = formatUUID(id)
		}
		if m.name == "ext4" {
			s.Type = extVersion(head)
		}
		return s, true
	}
	return signature{}, false
}

// probeText recognises the formats that hold their UUID as text.
func probeText(head []byte) (signature, bool) {
	if string(at(head, 0, 6)) == "LUKS\xba\xbe" {
		return signature{"crypto_LUKS", cString(at(head, 168, 40))}, true
	}
	// A physical volume has its label in one of the first four sectors; the
	// label says where the header with the identifier begins.
	for sector := 0; sector < 4; sector++ {
		label := at(head, sector*512, 512)
		if label == nil || string(label[:8]) != "LABELONE" || string(label[24:32]) != "LVM2 001" {
			continue
		}
		id := at(label, int(binary.LittleEndian.Uint32(label[20:])), 32)
		return signature{"LVM2_member", formatLVM(string(id))}, true
	}
	return signature{}, false
}

// extVersion tells ext2, ext3 and ext4 apart by their features, as mount does.
func extVersion(head []byte) string {
	features := at(head, 1024+92, 12)
	if features == nil {
		return "ext4"
	}
	const hasJournal, ext3Incompat = 0x4, 0x1f &^ 0x8 // compression, filetype, recover, meta_bg
	compat := binary.LittleEndian.Uint32(features)
	incompat := binary.LittleEndian.Uint32(features[4:])
	roCompat := binary.LittleEndian.Uint32(features[8:])
	switch {
	case incompat&^uint32(ext3Incompat) != 0, roCompat&^0x7 != 0:
		return "ext4"
	case compat&hasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func formatUUID(b []byte) string {
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:32]}, "-")
}

// formatLVM writes 32 characters in LVM's groups of 6-4-4-4-4-4-6.
func formatLVM(s string) string {
	if len(s) != 32 {
		return s
	}
	return strings.Join([]string{s[:6], s[6:10], s[10:14], s[14:18], s[18:22], s[22:26], s[26:]}, "-")
}

// head reads the first bytes of the device, fewer if it is smaller.
func (d *Device) head(ctx context.Context) ([]byte, error) {
	buf := AlignedBuffer(int(min(d.size, headSize)))
	if err := d.ReadExtent(ctx, buf, 0); err != nil {
		return nil, fmt.Errorf("look for a superblock: %w", err)
	}
	return buf, nil
}
