// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
)

// Features of ext2, ext3 and ext4 (fs/ext4/ext4.h) with which a mount for
// writing is known to change the superblock first. The others end in doubt.
const (
	extIncompat = 0x2 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
	extROCompat = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x8000

	extHasJournal    = 0x4     // compatible
	extRecover       = 0x4     // incompatible: the journal must be replayed
	extMetadataCsum  = 0x400   // compatible for reading
	extOrphanPresent = 0x10000 // compatible for reading: mounted, or not unmounted
	extValid         = 0x1     // state: unmounted, without errors
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ext4 covers ext2, ext3 and ext4. Before a mount for writing returns, the count
// of mounts and the time of the last one are in the superblock; e2fsck and
// the other tools set the time of writing, or of the check. The block of the
// journal's own superblock is hashed besides where it is easy to find.
func (w *walker) ext4(r span, head []byte) error {
	sb := at(head, 1024, 1024)
	if sb == nil {
		return w.unknown(r, "a damaged ext4")
	}
	u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
	compat, incompat, ro := u32(sb[0x5c:]), u32(sb[0x60:]), u32(sb[0x64:])
	logBlock := u32(sb[0x18:])
	blocks := uint64(u32(sb[4:]))
	if incompat&0x80 != 0 {
		blocks |= uint64(u32(sb[0x150:])) << 32
	}
	hi, size := bits.Mul64(blocks, 1024<<min(logBlock, 6))
	switch {
	case logBlock > 6, hi != 0, blocks == 0, size > uint64(r.len):
		return w.unknown(r, "an ext4 that is larger than its place, or damaged")
	case ro&extMetadataCsum != 0 && ^crc32.Checksum(sb[:0x3fc], castagnoli) != u32(sb[0x3fc:]):
		return w.unknown(r, "an ext4 with a damaged superblock")
	case incompat&extRecover != 0, ro&extOrphanPresent != 0, u16(sb[0x3a:]) != extValid, u32(sb[0xe8:]) != 0:
		return doubtf("the ext4 at byte %d is mounted, or was not unmounted cleanly, or has errors", r.off)
	case incompat&^extIncompat != 0, ro&^extROCompat != 0, u32(sb[0x4c:]) > 1:
		return w.unknown(r, "an ext4 with features that are not known")
	case compat&extHasJournal != 0 && (u32(sb[0xe0:]) == 0 || u32(sb[0xe4:]) != 0):
		return w.unknown(r, "an ext4 with its journal on another device")
	}
	fs := span{r.off, int64(size)}
	spans := []span{fs.clip(span{r.off, bootArea})}
	if block := journalStart(sb); compat&extHasJournal != 0 && block > 0 && block < blocks {
		unit := int64(1024) << logBlock
		spans = append(spans, fs.clip(span{r.off + int64(block)*unit, unit}))
	}
	if err := w.noBootLoader(r, func() ([]span, error) { return w.extRoot(fs, sb) }); err != nil {
		return err
	}
	return w.add(Part{Offset: r.off, Length: r.len, Kind: "ext4", ID: formatUUID(sb[0x68:0x78])}, spans, slack(r, fs.len))
}

// journalStart is the block of the journal's superblock by the copy of its
// inode's block map in the file system's, 0 if it is not plainly there.
func journalStart(sb []byte) uint64 {
	m := sb[0x10c:]
	switch {
	case sb[0xfd] != 1: // no copy
		return 0
	case binary.LittleEndian.Uint16(m) != 0xf30a: // blocks, not extents
		return uint64(binary.LittleEndian.Uint32(m))
	case binary.LittleEndian.Uint16(m[2:]) == 0, binary.LittleEndian.Uint16(m[6:]) != 0, binary.LittleEndian.Uint32(m[12:]) != 0:
		return 0
	}
	return uint64(binary.LittleEndian.Uint16(m[18:]))<<32 | uint64(binary.LittleEndian.Uint32(m[20:]))
}
