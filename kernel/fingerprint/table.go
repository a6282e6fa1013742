// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
)

const (
	gptMagic      = "EFI PART"
	typeGPT       = 0xee
	maxEntries    = 1024 // of a GPT; 128 is usual
	maxEntrySize  = 4096
	maxLogical    = 128 // partitions in an extended one
	tableSector   = 512
	minEntrySize  = 128
	gptHeaderSize = 92
)

// mbrEntry is a line of a partition table; sectors of 512 bytes.
type mbrEntry struct {
	kind          byte
	start, length int64
}

func (e mbrEntry) empty() bool    { return e.kind == 0 || e.length == 0 }
func (e mbrEntry) extended() bool { return e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85 }

// mbrEntries reads the four lines of a sector, nil if it is none of a table.
func mbrEntries(sector []byte) []mbrEntry {
	b := at(sector, 0, tableSector)
	if b == nil || b[510] != 0x55 || b[511] != 0xaa {
		return nil
	}
	out := make([]mbrEntry, 4)
	for i := range out {
		e := b[446+16*i:]
		if e[0]&0x7f != 0 {
			return nil // code of a file system's boot sector
		}
		out[i] = mbrEntry{e[4], int64(binary.LittleEndian.Uint32(e[8:])), int64(binary.LittleEndian.Uint32(e[12:]))}
	}
	return out
}

// tableKind tells by the first bytes of a region: "gpt", "mbr" or "".
func tableKind(head []byte) string {
	if string(at(head, 512, 8)) == gptMagic || string(at(head, 4096, 8)) == gptMagic {
		return "gpt"
	}
	entries := mbrEntries(head)
	switch {
	case slices.ContainsFunc(entries, func(e mbrEntry) bool { return e.kind == typeGPT }):
		return "gpt" // whose header is missing
	case slices.ContainsFunc(entries, func(e mbrEntry) bool { return !e.empty() }):
		return "mbr"
	}
	return ""
}

// table covers a partitioned region: what belongs to no partition, the tables
// among it, is hashed whole, and each partition is a region of its own.
func (w *walker) table(r span, head []byte, kind string, depth int) error {
	var (
		parts []span
		id    string
		err   error
	)
	if kind == "gpt" {
		parts, id, err = w.gpt(r, head)
	} else {
		parts, id, err = w.mbr(r, head)
	}
	if err != nil {
		return err
	}
	slices.SortFunc(parts, func(a, b span) int { return cmp.Compare(a.off, b.off) })
	var gaps []span
	next := r.off
	for _, p := range parts {
		if p.len <= 0 || p.off < next || p.end() > r.end() {
			return doubtf("the %s partition table at byte %d has partitions that overlap or reach beyond their disk", kind, r.off)
		}
		if p.off > next {
			gaps = append(gaps, span{next, p.off - next})
		}
		next = p.end()
	}
	if next < r.end() {
		gaps = append(gaps, span{next, r.end() - next})
	}
	if err := w.add(Part{Offset: r.off, Length: r.len, Kind: kind, ID: id}, nil, gaps); err != nil {
		return err
	}
	for _, p := range parts {
		if err := w.region(p, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// mbr lists the partitions of a table, the logical ones in the place of an
// extended one.
func (w *walker) mbr(r span, head []byte) (parts []span, id string, err error) {
	for _, e := range mbrEntries(head) {
		p := span{r.off + e.start*tableSector, e.length * tableSector}
		switch {
		case e.empty():
		case e.extended():
			logical, err := w.logical(r, p)
			if err != nil {
				return nil, "", err
			}
			parts = append(parts, logical...)
		default:
			parts = append(parts, p)
		}
		if !e.empty() && p.off == r.off {
			return nil, "", doubtf("the mbr partition table at byte %d lies in one of its partitions", r.off)
		}
	}
	return parts, fmt.Sprintf("%08x", binary.LittleEndian.Uint32(head[440:])), nil
}

// logical follows the chain of tables in an extended partition. Each says where
// its own partition lies, and where the next table is.
func (w *walker) logical(r, ext span) (parts []span, err error) {
	var tables []span
	defer func() {
		if err == nil && overlap(parts, tables) {
			err = doubtf("the extended partition at byte %d is damaged", ext.off)
		}
	}()
	for table := ext.off; ; {
		tables = append(tables, span{table, tableSector})
		if table < ext.off || table+tableSector > min(ext.end(), r.end()) {
			return nil, doubtf("the extended partition at byte %d is damaged", ext.off)
		}
		b, err := w.read(span{table, tableSector})
		if err != nil {
			return nil, err
		}
		next := table
		for _, e := range mbrEntries(b) {
			switch {
			case e.empty():
			case e.extended():
				next = ext.off + e.start*tableSector
			default:
				parts = append(parts, span{table + e.start*tableSector, e.length * tableSector})
			}
		}
		if next == table {
			return parts, nil
		}
		if next < table || len(parts) > maxLogical {
			return nil, doubtf("the extended partition at byte %d is damaged", ext.off)
		}
		table = next
	}
}

func overlap(a, b []span) bool {
	return slices.ContainsFunc(a, func(s span) bool {
		return slices.ContainsFunc(b, func(t span) bool { return s.clip(t).len > 0 })
	})
}

// gpt lists the partitions of a table that is whole; the kernel would use the
// copy of one that is not. A hybrid one is not followed.
func (w *walker) gpt(r span, head []byte) (parts []span, id string, err error) {
	bad := func(why string) ([]span, string, error) {
		return nil, "", doubtf("the gpt partition table at byte %d %s", r.off, why)
	}
	for _, e := range mbrEntries(head) {
		if !e.empty() && e.kind != typeGPT {
			return bad("has an mbr with other partitions beside it")
		}
	}
	sector := int64(tableSector)
	if string(at(head, tableSector, 8)) != gptMagic {
		sector = 4096
	}
	h := slices.Clone(at(head, int(sector), gptHeaderSize))
	if h == nil || string(h[:8]) != gptMagic || sector == tableSector && string(at(head, 4096, 8)) == gptMagic {
		return bad("has no header, or two")
	}
	sum := binary.LittleEndian.Uint32(h[16:])
	clear(h[16:20])
	lba, count, size := int64(binary.LittleEndian.Uint64(h[72:])), int64(binary.LittleEndian.Uint32(h[80:])), int64(binary.LittleEndian.Uint32(h[84:]))
	switch {
	case binary.LittleEndian.Uint32(h[12:]) != gptHeaderSize, crc32.ChecksumIEEE(h) != sum, binary.LittleEndian.Uint64(h[24:]) != 1:
		return bad("is damaged")
	case count > maxEntries, size < minEntrySize, size > maxEntrySize, size%minEntrySize != 0, lba < 2, lba > r.len/sector:
		return bad("is damaged, or too large")
	}
	array := span{r.off + lba*sector, count * size}
	if array.end() > r.end() {
		return bad("is damaged")
	}
	entries, err := w.read(array)
	if err != nil {
		return nil, "", err
	}
	if crc32.ChecksumIEEE(entries) != binary.LittleEndian.Uint32(h[88:]) {
		return bad("is damaged")
	}
	for e := range slices.Chunk(entries, int(size)) {
		if [16]byte(e[:16]) == [16]byte{} {
			continue
		}
		first, last := int64(binary.LittleEndian.Uint64(e[32:])), int64(binary.LittleEndian.Uint64(e[40:]))
		if first < 2 || last < first || last >= r.len/sector {
			return bad("has a partition beyond its disk")
		}
		p := span{r.off + first*sector, (last - first + 1) * sector}
		if p.clip(array).len > 0 {
			return bad("lies in one of its partitions")
		}
		parts = append(parts, p)
	}
	return parts, formatUUID(h[56:72]), nil
}
