// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"encoding/binary"
	"regexp"
	"slices"
)

// A boot loader writes to files before there is a kernel, block by block and
// without a mount: GRUB to grubenv, at every boot on some systems, syslinux to
// ldlinux.sys. No superblock tells of it. So a file system whose root directory
// holds what a boot loader could have in it is not vouched for.
//
// The directory is searched for entries as bytes, whatever else is in its blocks:
// the length of the name, then two bytes (a short directory of XFS) or one
// (ext4) or none (XFS), then the name.
var bootNames = regexp.MustCompile(`(?s)` +
	`\x04.{0,2}(boot|grub)|\x05.{0,2}grub2|\x08.{0,2}(extlinux|syslinux)|\x0b.{0,2}ldlinux\.sys|\x09.{0,2}uboot\.env`)

const maxRoot = 4 << 20 // bytes of a root directory

// noBootLoader ends in doubt if the root directory holds such a name, or cannot
// be found.
func (w *walker) noBootLoader(r span, find func() ([]span, error)) error {
	spans, err := find()
	if err != nil {
		return err
	}
	total := int64(0)
	for _, s := range spans {
		total += s.len
	}
	if spans == nil || total > maxRoot {
		return doubtf("the root directory of the file system at byte %d is too large to look through, or damaged", r.off)
	}
	for _, s := range spans {
		if s.off < r.off || s.end() > r.end() {
			return doubtf("the root directory of the file system at byte %d is damaged", r.off)
		}
		b, err := w.read(s)
		if err != nil {
			return err
		}
		if m := bootNames.FindSubmatch(b); m != nil {
			return doubtf("the file system at byte %d has a boot loader's files, or a folder for them; boot loaders write past the file system", r.off)
		}
	}
	return nil
}

// extRoot finds the blocks of the root directory of an ext2, ext3 or ext4 by
// inode 2; nil if that takes more than a tree of one level.
func (w *walker) extRoot(fs span, sb []byte) ([]span, error) {
	u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
	unit := int64(1024) << u32(sb[0x18:])
	wide := u32(sb[0x60:])&0x80 != 0 && u16(sb[0xfe:]) >= 64
	inodeSize := int64(128)
	if u32(sb[0x4c:]) > 0 {
		inodeSize = int64(u16(sb[0x58:]))
	}
	block := func(n int64, count int64) span { return span{fs.off + n*unit, count * unit} }
	inside := func(s span) bool { return s.off > fs.off && s.len > 0 && s.len <= maxRoot && s.end() <= fs.end() }

	// The descriptors follow the block of the superblock.
	group := block(1024/unit+1, 1)
	if !inside(group) {
		return nil, nil
	}
	b, err := w.read(span{group.off, 64})
	if err != nil {
		return nil, err
	}
	table := int64(u32(b[8:]))
	if wide {
		table |= int64(u32(b[0x28:])&0xffff) << 32 // 48 bits are in use
	}
	inode := span{block(table, 1).off + inodeSize, inodeSize}
	if inodeSize < 128 || !inside(inode) {
		return nil, nil
	}
	if b, err = w.read(inode); err != nil {
		return nil, err
	}
	const extents, inline, encrypted = 0x80000, 0x10000000, 0x800
	flags, root := u32(b[0x20:]), b[0x28:0x28+60]
	if u16(b)&0xf000 != 0x4000 || flags&(inline|encrypted) != 0 {
		return nil, nil
	}
	var out []span
	if flags&extents == 0 {
		for i := range 12 {
			if n := u32(root[4*i:]); n != 0 {
				out = append(out, block(int64(n), 1))
			}
		}
		if u32(root[52:]) != 0 || u32(root[56:]) != 0 {
			return nil, nil
		}
		list := block(int64(u32(root[48:])), 1) // of further blocks
		if u32(root[48:]) == 0 {
			return out, nil
		}
		if !inside(list) {
			return nil, nil
		}
		if b, err = w.read(list); err != nil {
			return nil, err
		}
		for e := range slices.Chunk(b, 4) {
			if n := u32(e); n != 0 {
				out = append(out, block(int64(n), 1))
			}
		}
		return out, nil
	}
	leaves := [][]byte{root}
	if u16(root[6:]) == 1 {
		leaves = nil
		for i := range min(int(u16(root[2:])), 4) {
			e := root[12+12*i:]
			s := block(int64(u16(e[8:]))<<32|int64(u32(e[4:])), 1)
			if !inside(s) {
				return nil, nil
			}
			if b, err = w.read(s); err != nil {
				return nil, err
			}
			leaves = append(leaves, b)
		}
	}
	for _, leaf := range leaves {
		if u16(leaf) != 0xf30a || u16(leaf[6:]) != 0 {
			return nil, nil
		}
		for i := range int(u16(leaf[2:])) {
			e := at(leaf, 12+12*i, 12)
			if e == nil {
				return nil, nil
			}
			s := block(int64(u16(e[6:]))<<32|int64(u32(e[8:])), int64(u16(e[4:])))
			if !inside(s) {
				return nil, nil
			}
			out = append(out, s)
		}
	}
	return out, nil
}

// xfsRoot finds the root directory of an XFS: its inode itself, or the blocks
// that it lists; nil if they are in a tree.
func (w *walker) xfsRoot(r span, sb xfsSuper, head []byte) ([]span, error) {
	ino := binary.BigEndian.Uint64(head[56:])
	size := int64(binary.BigEndian.Uint16(head[104:]))
	agLog, perLog := head[124], head[123]
	if !powerOfTwo(size, 256, 2048) || perLog > 8 || int64(1)<<perLog != sb.block/size {
		return nil, nil
	}
	group := int64(sb.group)
	byteOf := func(fsBlock int64) int64 {
		return r.off + fsBlock>>agLog*group + fsBlock&(1<<agLog-1)*sb.block
	}
	fs := span{r.off, sb.size}
	inside := func(s span) bool { return s.off > r.off && s.len > 0 && s.len <= maxRoot && s.end() <= fs.end() }
	if ino>>(agLog+perLog) >= uint64(sb.groups) {
		return nil, nil
	}
	inode := span{byteOf(int64(ino>>perLog)) + int64(ino&(1<<perLog-1))*size, size}
	if !inside(inode) {
		return nil, nil
	}
	b, err := w.read(inode)
	if err != nil {
		return nil, err
	}
	if string(b[:2]) != "IN" || binary.BigEndian.Uint16(b[2:])&0xf000 != 0x4000 || b[4] != 3 {
		return nil, nil
	}
	const local, extents = 1, 2
	switch b[5] {
	case local:
		return []span{inode}, nil
	case extents:
	default:
		return nil, nil
	}
	// The data fork begins with as many extents as the inode counts.
	n := uint64(binary.BigEndian.Uint32(b[76:]))
	if wide := uint64(0x10); binary.BigEndian.Uint64(b[120:])&wide != 0 {
		n = binary.BigEndian.Uint64(b[24:])
	}
	fork := b[176:]
	if n == 0 || n > uint64(len(fork)/16) {
		return nil, nil
	}
	var out []span
	for e := range slices.Chunk(fork[:16*n], 16) {
		l0, l1 := binary.BigEndian.Uint64(e), binary.BigEndian.Uint64(e[8:])
		count := int64(l1 & (1<<21 - 1))
		start := l0&(1<<9-1)<<43 | l1>>21
		if start>>agLog >= uint64(sb.groups) {
			return nil, nil
		}
		s := span{byteOf(int64(start)), count * sb.block}
		if !inside(s) {
			return nil, nil
		}
		out = append(out, s)
	}
	return out, nil
}
