// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"encoding/hex"
	"strings"
)

// magics tell what a region may be. Whatever is not listed is unknown all the
// same; these make the reason readable, and show when a region is two things
// at once. Named as libblkid does, with an article where it is only ever
// printed.
var magics = []struct {
	name   string
	offset int
	magic  string
}{
	{"xfs", 0, "XFSB"},
	{"ext4", 1024 + 56, "\x53\xef"},
	{"btrfs (a mount writes nothing before its first commit)", 0x10040, "_BHRfS_M"},
	{"swap space", 4096 - 10, "SWAPSPACE2"},
	{"swap space", 65536 - 10, "SWAPSPACE2"},
	{"a LUKS volume", 0, "LUKS\xba\xbe"},
	{"an md member", 0, "\xfc\x4e\x2b\xa9"},
	{"an md member", 4096, "\xfc\x4e\x2b\xa9"},
	{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{"bcachefs", 4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"},
	{"an LVM physical volume", 0, "LABELONE"},
	{"an LVM physical volume", 512, "LABELONE"},
	{"an LVM physical volume", 1024, "LABELONE"},
	{"an LVM physical volume", 1536, "LABELONE"},
	{"f2fs", 1024, "\x10\x20\xf5\xf2"},
	{"ntfs", 3, "NTFS    "},
	{"exfat", 3, "EXFAT   "},
	{"vfat", 54, "FAT"},
	{"vfat", 82, "FAT32"},
	{"iso9660", 0x8001, "CD001"},
	{"squashfs", 0, "hsqs"},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0"},
}

// probe names everything that a region claims to be, each once.
func (w *walker) probe(r span, head []byte) ([]string, error) {
	var kinds []string
	seen := map[string]bool{}
	found := func(name string) {
		if !seen[name] {
			seen[name] = true
			kinds = append(kinds, name)
		}
	}
	for _, m := range magics {
		if string(at(head, m.offset, len(m.magic))) == m.magic {
			found(m.name)
		}
	}
	if kind := tableKind(head); kind != "" {
		found(kind)
	}
	// An md superblock at the end: version 1.0, then 0.90 in either byte order.
	for _, end := range []struct {
		off    int64
		magics []string
	}{
		{(r.len/512 - 16) &^ 7 * 512, []string{"\xfc\x4e\x2b\xa9"}},
		{r.len&^0xffff - 0x10000, []string{"\xfc\x4e\x2b\xa9", "\xa9\x2b\x4e\xfc"}},
	} {
		if end.off < 0 {
			continue
		}
		b, err := w.read(r.clip(span{r.off + end.off, 512}))
		if err != nil {
			return nil, err
		}
		for _, m := range end.magics {
			if strings.HasPrefix(string(b), m) {
				found("an md member")
			}
		}
	}
	return kinds, nil
}

// at is a slice of b, nil where b is too short.
func at(b []byte, off, n int) []byte {
	if off < 0 || n < 0 || off > len(b)-n {
		return nil
	}
	return b[off : off+n]
}

func formatUUID(b []byte) string {
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:32]}, "-")
}
