// SPDX-License-Identifier: BSD-2-Clause

package pack

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

func readAt(data []byte) func([]byte, int64) error {
	return func(p []byte, offset int64) error {
		_, err := bytes.NewReader(data).ReadAt(p, offset)
		return err
	}
}

// buildPack makes a pack of n blobs of random types and sizes.
func buildPack(t testing.TB, key *crypto.Key, rng *rand.Rand, n int) ([]byte, []Blob) {
	t.Helper()
	b := NewBuilder(nil, 1<<20)
	for i := range n {
		plain := make([]byte, rng.IntN(2000))
		h := Handle{BlobType(1 + rng.IntN(2)), Hash(fmt.Append(nil, i))}
		size := b.Size()
		uncompressed := rng.IntN(3) * 1000
		b.Add(h, key.Seal(nil, plain), uncompressed)
		if want := size + len(plain) + crypto.Overhead + EntrySize(Blob{UncompressedLength: uint32(uncompressed)}); b.Size() != want {
			t.Fatalf("size %d, want %d", b.Size(), want)
		}
	}
	size := b.Size()
	data, blobs, err := b.Finish(key)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) != size || len(blobs) != n {
		t.Fatalf("%d bytes and %d blobs, announced as %d and %d", len(data), len(blobs), size, n)
	}
	return data, blobs
}

func TestHeaderListsWhatWasAdded(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	key := crypto.NewKey()
	for _, n := range []int{1, 2, 16, 17, 18, 1000} { // around what the first read of a header gets
		data, blobs := buildPack(t, key, rng, n)
		got, err := ReadHeader(key, int64(len(data)), readAt(data))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, blobs) {
			t.Errorf("%d blobs: got %v, want %v", n, got, blobs)
		}
		for _, b := range got {
			if _, err := key.Open(nil, data[b.Offset:b.Offset+b.Length]); err != nil {
				t.Errorf("blob at %d: %v", b.Offset, err)
			}
		}
	}
}

func TestCutAndDamagedPacksAreNoticed(t *testing.T) {
	key := crypto.NewKey()
	data, _ := buildPack(t, key, rand.New(rand.NewPCG(1, 1)), 20)
	for n := range data {
		if _, err := ReadHeader(key, int64(n), readAt(data[:n])); err == nil {
			t.Fatalf("a pack cut to %d of %d bytes is read", n, len(data))
		}
	}
	header := int(binary.LittleEndian.Uint32(data[len(data)-4:])) + 4
	for i := len(data) - header; i < len(data); i++ {
		bad := bytes.Clone(data)
		bad[i] ^= 0x40
		if _, err := ReadHeader(key, int64(len(bad)), readAt(bad)); err == nil {
			t.Fatalf("byte %d flipped: it is read", i)
		}
	}
	if _, err := ReadHeader(key, int64(len(data)+1), readAt(append([]byte{0}, data...))); !errors.Is(err, ErrFormat) {
		t.Errorf("bytes that no blob owns: %v", err)
	}
}

func TestMergedPackHoldsTheBlobsOfBoth(t *testing.T) {
	key := crypto.NewKey()
	a, b := NewBuilder(nil, 1<<20), NewBuilder(nil, 1<<20)
	a.Add(Handle{DataBlob, Hash([]byte("a"))}, key.Seal(nil, []byte("a")), 0)
	b.Add(Handle{DataBlob, Hash([]byte("b"))}, key.Seal(nil, []byte("b")), 1)
	a.Merge(b)
	data, blobs, err := a.Finish(key)
	if err != nil || len(blobs) != 2 || a.Len() != 2 {
		t.Fatalf("%v, %v", blobs, err)
	}
	for i, want := range []string{"a", "b"} {
		got, err := key.Open(nil, data[blobs[i].Offset:blobs[i].Offset+blobs[i].Length])
		if err != nil || string(got) != want || blobs[i].UncompressedLength != uint32(i) {
			t.Errorf("%q, %v, %+v", got, err, blobs[i])
		}
	}
}

// The header's plaintext, byte for byte as restic's design document has it.
func TestHeaderGolden(t *testing.T) {
	id := ID{0: 0xaa, 31: 0xbb}
	const idHex = "aa000000000000000000000000000000000000000000000000000000000000bb"
	blobs := []Blob{
		{Handle{DataBlob, id}, 0, 40, 0},
		{Handle{TreeBlob, id}, 40, 50, 0},
		{Handle{DataBlob, id}, 90, 60, 1000},
		{Handle{TreeBlob, id}, 150, 70, 65536},
	}
	got, err := appendHeader(nil, blobs)
	if err != nil {
		t.Fatal(err)
	}
	want := "0028000000" + idHex + "0132000000" + idHex + "023c000000e8030000" + idHex + "034600000000000100" + idHex
	if hex.EncodeToString(got) != want {
		t.Errorf("got %x, want %s", got, want)
	}
	again, err := parseHeader(got)
	if err != nil || !slices.Equal(again, blobs) {
		t.Errorf("got %v, %v", again, err)
	}
}

func TestBuilderStaysWithinItsLimit(t *testing.T) {
	key, limit := crypto.NewKey(), 700<<10
	b := NewBuilder(nil, limit)
	sealed := key.Seal(nil, make([]byte, 10000))
	for i := 0; b.Size()+len(sealed)+plainEntrySize <= limit; i++ {
		b.Add(Handle{DataBlob, Hash(fmt.Append(nil, i))}, sealed, 0)
	}
	data, _, err := b.Finish(key)
	if err != nil || cap(data) > limit || len(data) < limit-20000 {
		t.Errorf("a pack of %d bytes takes %d, limit %d: %v", len(data), cap(data), limit, err)
	}
}

func TestIDsAndTypesAsJSON(t *testing.T) {
	id := Hash([]byte("x"))
	data, err := json.Marshal(map[string]any{"id": id, "type": TreeBlob})
	if err != nil || string(data) != `{"id":"`+id.String()+`","type":"tree"}` {
		t.Errorf("%s, %v", data, err)
	}
	var v struct {
		ID   ID
		Type BlobType
	}
	if err := json.Unmarshal(data, &v); err != nil || v.ID != id || v.Type != TreeBlob {
		t.Errorf("%v, %v", v, err)
	}
	for _, bad := range []string{`{"id":""}`, `{"id":"zz"}`, `{"id":"` + id.String() + `00"}`, `{"type":"Tree"}`, `{"id":7}`} {
		if err := json.Unmarshal([]byte(bad), &v); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
	if _, err := json.Marshal(BlobType(0)); err == nil {
		t.Error("no type is encoded")
	}
}

func FuzzHeader(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, plainEntrySize))
	f.Add(append([]byte{3, 40, 0, 0, 0, 1, 0, 0, 0}, make([]byte, 32)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		blobs, err := parseHeader(data)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Errorf("not ErrFormat: %v", err)
			}
			return
		}
		again, err := appendHeader(nil, blobs)
		if err != nil || !bytes.Equal(again, data) {
			t.Errorf("%x decodes and encodes to %x, %v", data, again, err)
		}
	})
}

func FuzzPackFile(f *testing.F) {
	key := crypto.NewKey()
	data, _ := buildPack(f, key, rand.New(rand.NewPCG(1, 1)), 3)
	f.Add(data, 0, byte(0))
	f.Add(data, 1, byte(255))
	f.Fuzz(func(t *testing.T, data []byte, at int, flip byte) {
		if len(data) > 0 && at >= 0 {
			data = bytes.Clone(data)
			data[at%len(data)] ^= flip
		}
		blobs, err := ReadHeader(key, int64(len(data)), func(p []byte, offset int64) error {
			if offset < 0 || offset+int64(len(p)) > int64(len(data)) {
				t.Fatalf("reads %d bytes at %d of %d", len(p), offset, len(data))
			}
			copy(p, data[offset:])
			return nil
		})
		if err == nil {
			for _, b := range blobs {
				if int(b.Offset)+int(b.Length) > len(data) {
					t.Errorf("blob outside of the file: %+v", b)
				}
			}
		}
	})
}

func TestReadErrorsAreReported(t *testing.T) {
	_, err := ReadHeader(crypto.NewKey(), 1000, func([]byte, int64) error { return io.ErrUnexpectedEOF })
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}
