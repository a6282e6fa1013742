// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math"
	"os"
	"sync"
	"testing"
)

// patches is a device of zeros with a few blocks written: each 8 bytes of
// number, then 4096 of content.
type patches struct {
	size   int64
	blocks map[int64][]byte
	mu     sync.Mutex
	read   int64
	calls  int
	beyond bool
}

const patchLen = 8 + 4096

func newPatches(data []byte) *patches {
	p := &patches{size: imageSize, blocks: map[int64][]byte{}}
	for ; len(data) >= patchLen; data = data[patchLen:] {
		n := int64(binary.LittleEndian.Uint64(data) % (imageSize / 4096))
		p.blocks[n] = append([]byte(nil), data[8:patchLen]...)
	}
	// Sums that are right let a fuzzer get behind them.
	if b := p.blocks[0]; b != nil && string(b[:4]) == "XFSB" {
		if n := int(binary.BigEndian.Uint16(b[102:])); n >= 512 && n <= 4096 {
			clear(b[224:228])
			binary.LittleEndian.PutUint32(b[224:], crc32.Checksum(b[:n], castagnoli))
		}
	}
	if b := p.blocks[0]; b != nil {
		binary.LittleEndian.PutUint32(b[1024+0x3fc:], ^crc32.Checksum(b[1024:1024+0x3fc], castagnoli))
		clear(b[512+16 : 512+20])
		binary.LittleEndian.PutUint32(b[512+16:], crc32.ChecksumIEEE(b[512:512+92]))
	}
	return p
}

func (p *patches) ReadExtent(_ context.Context, buf []byte, off int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.read += int64(len(buf))
	p.calls++
	if off < 0 || off+int64(len(buf)) > p.size {
		p.beyond = true
		return errors.New("beyond the device")
	}
	clear(buf)
	for n := off / 4096; n*4096 < off+int64(len(buf)); n++ {
		if b := p.blocks[n]; b != nil {
			start := n*4096 - off
			if start >= 0 {
				copy(buf[start:], b)
			} else {
				copy(buf, b[-start:])
			}
		}
	}
	return nil
}

// recorder notes which blocks a layout looks at.
type recorder struct {
	Source
	seen map[int64]bool
}

func (r recorder) ReadExtent(ctx context.Context, buf []byte, off int64) error {
	for n := off / 4096; n*4096 < off+int64(len(buf)); n++ {
		r.seen[n] = true
	}
	return r.Source.ReadExtent(ctx, buf, off)
}

// corpus is what a layout reads of a device, as patches.
func corpus(t testing.TB, i image) []byte {
	f, err := os.Open(i.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := recorder{ReaderAt(f), map[int64]bool{}}
	if _, err := layout(context.Background(), r, i.size()); err != nil {
		t.Fatal(err)
	}
	var out []byte
	for n := range r.seen {
		b := make([]byte, 4096)
		if _, err := f.ReadAt(b, n*4096); err != nil {
			t.Fatal(err)
		}
		if [4096]byte(b) != [4096]byte{} {
			out = binary.LittleEndian.AppendUint64(out, uint64(n))
			out = append(out, b...)
		}
	}
	return out
}

// FuzzLayout feeds hostile superblocks and tables: reads stay bounded and within
// the device, and whatever proves something covers all of it.
func FuzzLayout(f *testing.F) {
	if os.Getuid() == 0 {
		for _, mkfs := range [][]string{{"mkfs.ext4", "-q"}, {"mkfs.xfs", "-q"}, {"mkfs.ext2", "-q"}} {
			seed := corpus(f, made(f, mkfs...))
			f.Add(seed)
			if err := feed(f, seed).Proof(); err != nil {
				f.Errorf("%v: %v", mkfs, err)
			}
		}
	}
	gpt := make([]byte, 2*patchLen)
	copy(gpt[8+446:], "\x00\x00\x02\x00\xee\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff\x00")
	copy(gpt[8+510:], "\x55\xaaEFI PART\x00\x00\x01\x00\x5c\x00\x00\x00")
	gpt[8+512+24], gpt[8+512+72], gpt[8+512+80], gpt[8+512+84] = 1, 2, 4, 128
	f.Add(gpt)
	mbr := make([]byte, patchLen)
	copy(mbr[8+446:], "\x00\x00\x00\x00\x05\x00\x00\x00\x01\x00\x00\x00\xff\xff\x00\x00\x00")
	copy(mbr[8+510:], "\x55\xaa")
	f.Add(mbr)
	f.Fuzz(func(t *testing.T, data []byte) { feed(t, data) })
}

func feed(t testing.TB, data []byte) Fingerprint {
	p := newPatches(data)
	parts, err := layout(context.Background(), p, p.size)
	var d doubt
	if err != nil && !errors.As(err, &d) || p.beyond {
		t.Fatalf("%v, beyond %v", err, p.beyond)
	}
	if p.read > maxRead || p.calls > 20000 {
		t.Fatalf("%d bytes in %d reads", p.read, p.calls)
	}
	fp := Fingerprint{Version: version, Size: p.size}
	if err != nil {
		fp.Doubt = d.reason
		return fp
	}
	// File systems and data, and what is hashed of the tables, are all of it.
	covered, hashed := int64(0), int64(0)
	for _, part := range parts {
		fp.Parts = append(fp.Parts, part.Part)
		for _, s := range part.spans {
			if s.off < 0 || s.len < 0 || s.end() > p.size || s.len > math.MaxInt32 {
				t.Fatalf("%v of %v", s, part.Part)
			}
			hashed += s.len
			if part.Kind == "gpt" || part.Kind == "mbr" {
				covered += s.len
			}
		}
		if part.Kind != "gpt" && part.Kind != "mbr" {
			covered += part.Length
		}
	}
	if covered != p.size || hashed > maxRead {
		t.Fatalf("covers %d of %d, hashes %d", covered, p.size, hashed)
	}
	return fp
}
