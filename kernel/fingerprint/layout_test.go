// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func doubtOf(t *testing.T, i image) string {
	t.Helper()
	f := i.take(Key{})
	if (f.Doubt == "") != (f.Proof() == nil) || f.Proof() != nil && !errors.Is(f.Proof(), ErrNoProof) {
		t.Errorf("doubt %q, proof %v", f.Doubt, f.Proof())
	}
	return f.Doubt
}

func TestWhatIsNotKnownProvesNothing(t *testing.T) {
	for _, c := range []struct {
		name, want string
		args       []string
	}{
		{"btrfs", "btrfs", []string{"mkfs.btrfs", "-q", "-f"}},
		{"swap", "swap", []string{"mkswap"}},
		{"external log", "another device", []string{"mkfs.xfs", "-q", "-f", "-l", "logdev=LOG,size=64m"}},
		{"real-time", "real-time", []string{"mkfs.xfs", "-q", "-f", "-r", "rtdev=LOG"}},
		{"xfs 4", "format", []string{"mkfs.xfs", "-q", "-f", "-m", "crc=0"}},
		{"nothing", "nothing that is known", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			needRoot(t)
			i, log := newImage(t, imageSize), newImage(t, 128<<20)
			if c.args != nil {
				args := append(c.args[1:len(c.args):len(c.args)], i.path)
				for n := range args {
					args[n] = strings.ReplaceAll(args[n], "LOG", log.path)
				}
				run(t, c.args[0], args...)
			}
			if d := doubtOf(t, i); !strings.Contains(d, c.want) {
				t.Errorf("%q", d)
			}
		})
	}
}

// TestBtrfsLeavesNoTrace is why btrfs is not known: a file that is not copied on
// write is overwritten in place, and a power cut before the next commit
// leaves the superblocks as they were.
func TestBtrfsLeavesNoTrace(t *testing.T) {
	needRoot(t)
	base := newImage(t, imageSize)
	run(t, "mkfs.btrfs", "-q", "-f", base.path)
	base.with("rw", func(dir string) {
		run(t, "chattr", "+C", dir)
		fill(t, dir)
	})
	left := cut("rw", overwrite)(t, base.copy())
	if left.equal(base) {
		t.Fatal("nothing was written")
	}
	a, b := supers(t, base), supers(t, left)
	if !bytes.Equal(a, b) {
		t.Log("this kernel writes the superblock at once")
	}
}

func supers(t *testing.T, i image) []byte {
	t.Helper()
	f, err := os.Open(i.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 8192)
	for n, off := range []int64{64 << 10, 64 << 20} {
		if _, err := f.ReadAt(b[n*4096:(n+1)*4096], off); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func TestInUseProvesNothing(t *testing.T) {
	for _, mkfs := range []string{"mkfs.ext4", "mkfs.xfs", "mkfs.ext2"} {
		t.Run(mkfs, func(t *testing.T) {
			i := made(t, mkfs, "-q")
			i.with("rw", func(dir string) {
				if d := doubtOf(t, i); !strings.Contains(d, "mounted") {
					t.Errorf("mounted: %q", d)
				}
			})
			if d := doubtOf(t, i); d != "" {
				t.Errorf("unmounted: %q", d)
			}
			left := cut("rw", overwrite)(t, i)
			if d := doubtOf(t, left); !strings.Contains(d, "mounted") {
				t.Errorf("after a power cut: %q", d)
			}
		})
	}
}

func TestSeveralSignaturesProveNothing(t *testing.T) {
	base := made(t, "mkfs.ext4", "-q")
	for name, do := range map[string]func(i image){
		"md 1.0":  func(i image) { i.write([]byte("\xfc\x4e\x2b\xa9"), (i.size()/512-16)&^7*512) },
		"md 0.90": func(i image) { i.write([]byte("\xfc\x4e\x2b\xa9"), i.size()&^0xffff-0x10000) },
		"LVM":     func(i image) { i.write([]byte("LABELONE"), 512) },
		"btrfs":   func(i image) { i.write([]byte("_BHRfS_M"), 0x10040) },
	} {
		t.Run(name, func(t *testing.T) {
			i := base.copy()
			do(i)
			if d := doubtOf(t, i); !strings.Contains(d, "both ext4 and ") {
				t.Errorf("%q", d)
			}
		})
	}
}

func TestBootLoadersFolders(t *testing.T) {
	for _, mkfs := range [][]string{
		{"mkfs.ext4", "-q"},
		{"mkfs.ext2", "-q"},
		{"mkfs.xfs", "-q"},
		{"mkfs.xfs", "-q", "-i", "nrext64=1", "-n", "size=16k"},
		{"mkfs.ext4", "-q", "-b", "1024", "-O", "^extents,^64bit"},
	} {
		for _, many := range soak([]int{0, 3000}, 40) {
			t.Run(strings.Join(mkfs, " ")+" "+itoa(int64(many)), func(t *testing.T) {
				i := made(t, mkfs...)
				i.with("rw", func(dir string) {
					for n := range many {
						name := filepath.Join(dir, strings.Repeat("x", 20)+string(rune('a'+n%26))+string(rune('a'+n/26%26))+string(rune('a'+n/676)))
						if err := os.WriteFile(name, nil, 0o600); err != nil {
							t.Fatal(err)
						}
					}
				})
				if d := doubtOf(t, i); d != "" {
					t.Fatalf("without: %q", d)
				}
				for _, name := range []string{"boot", "grub", "grub2", "extlinux", "ldlinux.sys", "uboot.env"} {
					i.with("rw", func(dir string) {
						if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
							t.Fatal(err)
						}
					})
					if d := doubtOf(t, i); !strings.Contains(d, "boot loader") {
						t.Errorf("with %s: %q", name, d)
					}
					i = i.copy()
					i.with("rw", func(dir string) {
						if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, "other-name-that-is-long")); err != nil {
							t.Fatal(err)
						}
						run(t, "rmdir", filepath.Join(dir, "other-name-that-is-long"))
					})
				}
			})
		}
	}
}

// disk is an image of partitions, with what lies in them.
type disk struct {
	image
	parts []span
}

func put(t *testing.T, to, from image, at int64) {
	t.Helper()
	run(t, "dd", "if="+from.path, "of="+to.path, "bs=1M", "conv=notrunc,sparse", "oflag=seek_bytes", "status=none",
		"seek="+itoa(at))
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// gptDisk has an ext4, an xfs and 8 MiB of anything.
func gptDisk(t *testing.T) disk {
	t.Helper()
	ext, xfs := made(t, "mkfs.ext4", "-q"), made(t, "mkfs.xfs", "-q")
	d := disk{newImage(t, 2*imageSize+32<<20), []span{{1 << 20, imageSize}, {imageSize + 2<<20, imageSize}, {2*imageSize + 4<<20, 8 << 20}}}
	writeGPT(d)
	put(t, d.image, ext, d.parts[0].off)
	put(t, d.image, xfs, d.parts[1].off)
	return d
}

func writeGPT(d disk) {
	last := d.size()/512 - 1
	entries := make([]byte, 128*128)
	for i, p := range d.parts {
		e := entries[128*i:]
		e[0], e[16] = 1, byte(i+1)
		binary.LittleEndian.PutUint64(e[32:], uint64(p.off/512))
		binary.LittleEndian.PutUint64(e[40:], uint64(p.end()/512-1))
	}
	header := func(at, other, array int64) []byte {
		h := make([]byte, 92)
		copy(h, "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00")
		binary.LittleEndian.PutUint64(h[24:], uint64(at))
		binary.LittleEndian.PutUint64(h[32:], uint64(other))
		binary.LittleEndian.PutUint64(h[72:], uint64(array))
		binary.LittleEndian.PutUint32(h[80:], 128)
		binary.LittleEndian.PutUint32(h[84:], 128)
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h))
		return h
	}
	mbr := make([]byte, 512)
	copy(mbr[446:], "\x00\x00\x02\x00\xee\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff")
	mbr[510], mbr[511] = 0x55, 0xaa
	d.write(mbr, 0)
	d.write(header(1, last, 2), 512)
	d.write(entries, 1024)
	d.write(entries, (last-32)*512)
	d.write(header(last, 1, last-32), last*512)
}

// mbrDisk has an ext4 in a primary partition, and in an extended one an xfs
// and 8 MiB of anything.
func mbrDisk(t *testing.T) disk {
	t.Helper()
	g := gptDisk(t)
	wipe := make([]byte, 1<<20-512)
	g.write(wipe, 512)
	g.write(wipe[:33*512], g.size()-33*512)
	table := func(at int64, entries ...[3]int64) {
		b := make([]byte, 512)
		for i, e := range entries {
			b[446+16*i+4] = byte(e[0])
			binary.LittleEndian.PutUint32(b[446+16*i+8:], uint32(e[1]/512))
			binary.LittleEndian.PutUint32(b[446+16*i+12:], uint32(e[2]/512))
		}
		b[510], b[511] = 0x55, 0xaa
		g.write(b, at)
	}
	ext := g.parts[1].off - 1<<20
	second := g.parts[2].off - 1<<20
	table(0, [3]int64{0x83, g.parts[0].off, g.parts[0].len}, [3]int64{5, ext, g.size() - ext})
	table(ext, [3]int64{0x83, 1 << 20, g.parts[1].len}, [3]int64{5, second - ext, 16 << 20})
	table(second, [3]int64{0x83, 1 << 20, g.parts[2].len})
	return g
}

func TestTables(t *testing.T) {
	needRoot(t)
	for name, mk := range map[string]func(*testing.T) disk{"gpt": gptDisk, "mbr": mbrDisk} {
		t.Run(name, func(t *testing.T) {
			d := mk(t)
			key := NewKey()
			before := d.take(key)
			if err := before.Proof(); err != nil {
				t.Fatal(err)
			}
			kinds := ""
			for _, p := range before.Parts {
				kinds += p.Kind + " "
			}
			if kinds != name+" ext4 xfs data " {
				t.Errorf("parts: %s", kinds)
			}
			// Every byte outside of the file systems counts.
			for _, r := range []span{
				{0, 440},
				{512, 1<<20 - 512},
				{d.parts[0].end(), 1 << 20},
				{d.parts[1].end(), 1 << 20},
				d.parts[2],
				{d.parts[2].end(), d.size() - d.parts[2].end()},
			} {
				for range 20 {
					off := r.off + rand.Int64N(r.len)
					old := d.flip(off)
					if err := before.Compare(d.take(key)); err == nil {
						t.Errorf("a changed byte at %d was not seen", off)
					}
					d.write(old, off)
				}
			}
			if err := before.Compare(d.take(key)); err != nil {
				t.Fatal(err)
			}
			for n := range 2 {
				c := disk{d.copy(), d.parts}
				dir, unmount := c.mount(c.path, "loop,offset="+itoa(d.parts[n].off)+",sizelimit="+itoa(d.parts[n].len))
				overwrite(t, dir)
				unmount()
				if err := before.Compare(c.take(key)); err == nil || !strings.Contains(err.Error(), []string{"ext4", "xfs"}[n]) {
					t.Errorf("partition %d mounted: %v", n+1, err)
				}
			}
			// One that is not known makes the whole disk unknown.
			c := disk{d.copy(), d.parts}
			c.write(make([]byte, 4096), d.parts[0].off)
			if got := doubtOf(t, c.image); !strings.Contains(got, "nothing that is known") {
				t.Errorf("%q", got)
			}
		})
	}
}

// flip changes a byte and returns what it was.
func (i image) flip(off int64) []byte {
	f, err := os.OpenFile(i.path, os.O_RDWR, 0)
	if err != nil {
		i.t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		i.t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{b[0] ^ 1<<rand.IntN(8)}, off); err != nil {
		i.t.Fatal(err)
	}
	return b[:]
}

func TestSmallDeviceIsHashedWhole(t *testing.T) {
	const size = 3<<20 + 512
	mem := make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(mem)
	take := func() Fingerprint {
		f, err := Take(context.Background(), ReaderAt(bytes.NewReader(mem)), size, Key{})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	before := take()
	for range 100 {
		off := rand.IntN(size)
		mem[off] ^= 0x10
		if err := before.Compare(take()); !errors.Is(err, ErrChanged) {
			t.Fatalf("byte %d: %v", off, err)
		}
		mem[off] ^= 0x10
	}
	if err := before.Compare(take()); err != nil {
		t.Fatal(err)
	}
}

// TestSampleCatchesItsShare writes behind the back of a file system: where the
// sample looks it is seen, elsewhere it is not, and a share of p of the blocks is
// missed with (1-p)^2048.
func TestSampleCatchesItsShare(t *testing.T) {
	base := made(t, "mkfs.ext4", "-q")
	key := Key{7}
	before := base.take(key)
	chosen := map[int64]bool{}
	r := rand.NewChaCha8(key)
	for range sampleBlocks {
		chosen[int64(r.Uint64()%(imageSize/sampleBlock))] = true
	}
	hit, miss := 0, 0
	for hit < 10 || miss < 10 {
		n := 100 + rand.Int64N(imageSize/sampleBlock-100)
		if chosen[n] && hit >= 10 || !chosen[n] && miss >= 10 {
			continue
		}
		off := n*sampleBlock + rand.Int64N(sampleBlock)
		old := base.flip(off)
		err := before.Compare(base.take(key))
		switch {
		case chosen[n] && err == nil:
			t.Errorf("block %d is in the sample, and its change was not seen", n)
		case !chosen[n] && err != nil && !strings.Contains(err.Error(), "ext4"):
			t.Errorf("block %d is not in the sample: %v", n, err)
		}
		if chosen[n] {
			hit++
		} else {
			miss++
		}
		base.write(old, off)
	}
}
