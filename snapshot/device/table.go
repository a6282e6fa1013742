// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"encoding/binary"
	"fmt"
)

// partitionTable is a GPT or an MBR, as far as its identifiers go.
type partitionTable struct {
	kind    string // "GPT" or "MBR"
	uuid    string // as libblkid writes it
	entries []byte // of a GPT, as far as they were read
	entry   int    // bytes per entry
}

// parseTable reads the table in a disk's first bytes. GPT: UEFI 2.10, section
// 5.3; MBR: section 5.2.1. A boot sector of a file system has the MBR's
// signature too, but no plausible partition.
func parseTable(head []byte, sector int) (partitionTable, bool) {
	if gpt := at(head, sector, 92); gpt != nil && string(gpt[:8]) == "EFI PART" {
		t := partitionTable{kind: "GPT", uuid: formatGUID(gpt[56:72])}
		lba := binary.LittleEndian.Uint64(gpt[72:])
		count, size := binary.LittleEndian.Uint32(gpt[80:]), binary.LittleEndian.Uint32(gpt[84:])
		if lba < uint64(len(head)/sector) && size >= 128 && size <= 4096 {
			start := int(lba) * sector
			end := uint64(start) + uint64(count)*uint64(size)
			t.entries, t.entry = head[start:min(uint64(len(head)), end)], int(size)
		}
		return t, true
	}
	mbr := at(head, 0, 512)
	if mbr == nil || mbr[510] != 0x55 || mbr[511] != 0xaa || !plausibleMBR(mbr) {
		return partitionTable{}, false
	}
	return partitionTable{kind: "MBR", uuid: fmt.Sprintf("%08x", binary.LittleEndian.Uint32(mbr[440:]))}, true
}

func plausibleMBR(mbr []byte) bool {
	found := false
	for i := 446; i < 510; i += 16 {
		e := mbr[i : i+16]
		if e[0]&0x7f != 0 {
			return false // neither active nor inactive: code of a boot sector
		}
		start, length := binary.LittleEndian.Uint32(e[8:]), binary.LittleEndian.Uint32(e[12:])
		found = found || e[4] != 0 && start != 0 && length != 0
	}
	return found
}

// partition is the identifier of partition number n, counted from 1, "" if
// the table has none.
func (t partitionTable) partition(n int) string {
	if n < 1 {
		return ""
	}
	if t.kind == "MBR" {
		return fmt.Sprintf("%s-%02x", t.uuid, n)
	}
	e := at(t.entries, (n-1)*t.entry, 128)
	if e == nil || t.entry == 0 {
		return ""
	}
	return formatGUID(e[16:32])
}

// formatGUID writes a GUID, whose first three fields are little-endian.
func formatGUID(b []byte) string {
	be := append([]byte(nil), b...)
	binary.BigEndian.PutUint32(be, binary.LittleEndian.Uint32(b))
	binary.BigEndian.PutUint16(be[4:], binary.LittleEndian.Uint16(b[4:]))
	binary.BigEndian.PutUint16(be[6:], binary.LittleEndian.Uint16(b[6:]))
	return formatUUID(be)
}
