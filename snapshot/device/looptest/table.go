// SPDX-License-Identifier: BSD-2-Clause

package looptest

import (
	"encoding/binary"
	"hash/crc32"
	"os"
	"strconv"
	"testing"
)

// Partition is a range of a disk, in sectors of 512 bytes.
type Partition struct{ Start, Sectors uint32 }

// AddPartition tells the kernel of partition number n of a disk, as a partition
// table would (which not every kernel can read), and returns its device.
func AddPartition(t testing.TB, disk string, n int, p Partition) string {
	t.Helper()
	number := strconv.Itoa(n)
	Run(t, "addpart", disk, number, strconv.Itoa(int(p.Start)), strconv.Itoa(int(p.Sectors)))
	t.Cleanup(func() { Run(t, "delpart", disk, number) })
	return disk + "p" + number
}

// WriteMBR writes a partition table of at most four entries, with the given
// disk signature.
func WriteMBR(t testing.TB, path string, signature uint32, parts ...Partition) {
	t.Helper()
	b := make([]byte, 512)
	binary.LittleEndian.PutUint32(b[440:], signature)
	for i, p := range parts {
		e := b[446+16*i:]
		e[4] = 0x83 // Linux
		binary.LittleEndian.PutUint32(e[8:], p.Start)
		binary.LittleEndian.PutUint32(e[12:], p.Sectors)
	}
	b[510], b[511] = 0x55, 0xaa
	write(t, path, b, 0)
}

// WriteGPT writes a protective MBR and a GPT (UEFI 2.10, section 5.3), without
// its copy at the end of a disk of size bytes. GUIDs are filled with the bytes
// id, id+1, … for the disk and the partitions in turn.
func WriteGPT(t testing.TB, path string, size int64, id byte, parts ...Partition) {
	t.Helper()
	last := uint64(size/512) - 1
	b := make([]byte, 34*512)
	b[446+4] = 0xee
	binary.LittleEndian.PutUint32(b[446+8:], 1)
	binary.LittleEndian.PutUint32(b[446+12:], uint32(last))
	b[510], b[511] = 0x55, 0xaa

	entries := b[1024:]
	for i, p := range parts {
		e := entries[128*i:]
		copy(e, "\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4") // Linux
		guid(e[16:32], id+1+byte(i))
		binary.LittleEndian.PutUint64(e[32:], uint64(p.Start))
		binary.LittleEndian.PutUint64(e[40:], uint64(p.Start)+uint64(p.Sectors)-1)
	}
	h := b[512 : 512+92]
	copy(h, "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00")
	binary.LittleEndian.PutUint64(h[24:], 1)
	binary.LittleEndian.PutUint64(h[32:], last)
	binary.LittleEndian.PutUint64(h[40:], 34)
	binary.LittleEndian.PutUint64(h[48:], last-34)
	guid(h[56:72], id)
	binary.LittleEndian.PutUint64(h[72:], 2)
	binary.LittleEndian.PutUint32(h[80:], 128)
	binary.LittleEndian.PutUint32(h[84:], 128)
	binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(entries[:128*128]))
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h))
	write(t, path, b, 0)
}

func guid(b []byte, v byte) {
	for i := range b {
		b[i] = v*16 + byte(i)
	}
}

func write(t testing.TB, path string, b []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}
