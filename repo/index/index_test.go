// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

var update = flag.Bool("update", false, "write the golden files anew")

func newRand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// randomID draws from few first bytes, so that IDs share their prefixes and
// come in several packs.
func randomID(rng *rand.Rand) (id pack.ID) {
	if rng.IntN(2) == 0 {
		id[0] = byte(rng.IntN(3))
		id[31] = byte(rng.IntN(200))
		return id
	}
	for i := range id {
		id[i] = byte(rng.Uint32())
	}
	return id
}

func randomPacks(rng *rand.Rand, packs, blobs int) []Pack {
	out := make([]Pack, packs)
	for i := range out {
		out[i].ID = pack.Hash(fmt.Append(nil, rng.Uint64()))
		offset := uint32(0)
		for range rng.IntN(blobs + 1) {
			b := pack.Blob{
				Handle: pack.Handle{Type: pack.BlobType(1 + rng.IntN(2)), ID: randomID(rng)},
				Offset: offset, Length: 32 + rng.Uint32N(1000), UncompressedLength: rng.Uint32N(2) * rng.Uint32N(5000),
			}
			offset += b.Length
			out[i].Blobs = append(out[i].Blobs, b)
		}
	}
	return out
}

// model is what a table should answer.
type model map[pack.Handle][]Location

func (m model) add(packs []Pack) {
	for _, p := range packs {
		for _, b := range p.Blobs {
			m[b.Handle] = append(m[b.Handle], Location{p.ID, b.Offset, b.Length, b.UncompressedLength})
		}
	}
}

func (m model) check(t testing.TB, tables ...*Table) {
	t.Helper()
	find := func(h pack.Handle, any bool) (found []Location) {
		for _, table := range tables {
			var err error
			if found, err = table.Find(found, h, any); err != nil {
				t.Fatal(err)
			}
		}
		return found
	}
	for h, want := range m {
		got := find(h, false)
		if !slices.Equal(sorted(got), sorted(want)) {
			t.Fatalf("%s: found at %v, want %v", h, got, want)
		}
		if got := find(h, true); len(got) != min(len(tables), len(got)) || len(got) == 0 || !slices.Contains(want, got[0]) {
			t.Fatalf("%s: any is %v of %v", h, got, want)
		}
		other := pack.Handle{Type: 3 - h.Type, ID: h.ID}
		if got := find(other, false); len(got) != len(m[other]) {
			t.Fatalf("%s: found at %v, want %v", other, got, m[other])
		}
		h.ID[30] ^= 0x55
		if got := find(h, false); len(got) != len(m[h]) {
			t.Fatalf("%s is not there, but found at %v", h, got)
		}
	}
	n := 0
	for _, table := range tables {
		last := pack.ID{}
		err := table.Each(func(h pack.Handle, l Location) error {
			n++
			if !slices.Contains(m[h], l) || h.ID.Compare(last) < 0 {
				t.Errorf("Each says %s at %v, after %s", h, l, last.Str())
			}
			last = h.ID
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range m {
		n -= len(want)
	}
	if n != 0 {
		t.Errorf("Each gives %d places more than there are", n)
	}
}

func sorted(l []Location) []Location {
	l = slices.Clone(l)
	slices.SortFunc(l, func(a, b Location) int {
		if c := a.Pack.Compare(b.Pack); c != 0 {
			return c
		}
		return int(int64(a.Offset) - int64(b.Offset))
	})
	return l
}

func buildTable(t testing.TB, source pack.ID, packs []Pack) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := WriteTable(&buf, source, packs); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func open(t testing.TB, data []byte) *Table {
	t.Helper()
	table, err := OpenTable(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestFileRoundTripsAndIsWhatResticWrites(t *testing.T) {
	id := pack.ID{1}
	packs := []Pack{{ID: pack.ID{2}, Blobs: []pack.Blob{
		{Handle: pack.Handle{Type: pack.DataBlob, ID: id}, Offset: 0, Length: 38},
		{Handle: pack.Handle{Type: pack.TreeBlob, ID: id}, Offset: 38, Length: 112, UncompressedLength: 511},
	}}}
	data, err := Encode(packs)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"packs":[{"id":"` + pack.ID{2}.String() + `","blobs":[` +
		`{"id":"` + id.String() + `","type":"data","offset":0,"length":38},` +
		`{"id":"` + id.String() + `","type":"tree","offset":38,"length":112,"uncompressed_length":511}]}]}` + "\n"
	if string(data) != want {
		t.Errorf("got  %swant %s", data, want)
	}
	again, err := Decode(data)
	if err != nil || fmt.Sprint(again) != fmt.Sprint(packs) {
		t.Errorf("got %v, %v", again, err)
	}
}

func TestDamagedFilesAreNoticed(t *testing.T) {
	good, err := Encode(randomPacks(newRand(t), 3, 5))
	if err != nil {
		t.Fatal(err)
	}
	id := pack.ID{}.String()
	for _, bad := range []string{
		"", "[]", `{"packs":[{"id":"x"}]}`, string(good[:len(good)/2]),
		`{"packs":[{"id":"` + id + `","blobs":[{"id":"` + id + `","type":"data","offset":0,"length":31}]}]}`,
		`{"packs":[{"id":"` + id + `","blobs":[{"id":"` + id + `","offset":0,"length":50}]}]}`,
		`{"packs":[{"id":"` + id + `","blobs":[{"id":"` + id + `","type":"data","offset":-1,"length":50}]}]}`,
		`{"packs":[{"id":"` + id + `","blobs":[{"id":"` + id + `","type":"data","offset":4294967295,"length":50}]}]}`,
	} {
		if _, err := Decode([]byte(bad)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%.60q: %v", bad, err)
		}
	}
}

func TestTableAnswersAsItsIndexFile(t *testing.T) {
	rng := newRand(t)
	for _, n := range []int{0, 1, 5, 300} {
		packs := randomPacks(rng, n, 60)
		m := model{}
		m.add(packs)
		table := open(t, buildTable(t, pack.ID{9}, packs))
		m.check(t, table)
		if got := table.Sources(); len(got) != 1 || got[0] != (pack.ID{9}) {
			t.Errorf("sources %v", got)
		}
	}
}

// Three thousand blobs with the same first eight bytes cover many pages with
// the same prefix.
func TestBlobsThatShareAPrefixAreFoundAcrossPages(t *testing.T) {
	m, packs := model{}, []Pack{{ID: pack.ID{5}}}
	for i := range 3000 {
		var id pack.ID
		binary.BigEndian.PutUint32(id[20:], uint32(i))
		packs[0].Blobs = append(packs[0].Blobs, pack.Blob{Handle: pack.Handle{Type: pack.DataBlob, ID: id}, Offset: uint32(i * 32), Length: 32})
	}
	m.add(packs)
	m.check(t, open(t, buildTable(t, pack.ID{9}, packs)))
}

func TestEveryDamagedPageIsNoticed(t *testing.T) {
	packs := randomPacks(newRand(t), 150, 20)
	data := buildTable(t, pack.ID{9}, packs)
	m := model{}
	m.add(packs)
	read := func(data []byte) error {
		table, err := OpenTable(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return err
		}
		if err := table.Each(func(pack.Handle, Location) error { return nil }); err != nil {
			return err
		}
		for h := range m {
			if _, err := table.Find(nil, h, false); err != nil {
				return err
			}
		}
		return nil
	}
	if err := read(data); err != nil {
		t.Fatal(err)
	}
	for p := range len(data) / pageSize {
		for _, at := range []int{0, 40, 2000, pageSize - 1} {
			bad := bytes.Clone(data)
			bad[p*pageSize+at] ^= 1
			if err := read(bad); !errors.Is(err, ErrDamaged) {
				t.Errorf("page %d, byte %d flipped: %v", p, at, err)
			}
		}
	}
	for n := 0; n < len(data); n += 1000 {
		if err := read(data[:n]); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	swapped := bytes.Clone(data) // two full pages of entries
	copy(swapped[5*pageSize:], data[6*pageSize:7*pageSize])
	copy(swapped[6*pageSize:], data[5*pageSize:6*pageSize])
	if err := read(swapped); !errors.Is(err, ErrDamaged) {
		t.Errorf("swapped pages: %v", err)
	}
}

// goldenPacks are what the golden table was made from.
func goldenPacks() []Pack {
	rng := rand.New(rand.NewPCG(1, 2))
	return []Pack{
		{ID: pack.Hash([]byte("pack 0")), Blobs: randomPacks(rng, 1, 40)[0].Blobs},
		{ID: pack.Hash([]byte("pack 1")), Blobs: randomPacks(rng, 1, 400)[0].Blobs},
	}
}

func TestTableFormatIsThatOfTheGoldenFile(t *testing.T) {
	name := filepath.Join("testdata", "table-v1.golden")
	data := buildTable(t, pack.Hash([]byte("index")), goldenPacks())
	if *update {
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(data, golden) {
		t.Errorf("the table is not that of %s: a new layout needs a new version", name)
	}
	m := model{}
	m.add(goldenPacks())
	m.check(t, open(t, golden))
}

// BenchmarkFind looks up blobs that are not there, as most are in a backup, in
// a table of a million on disk.
func BenchmarkFind(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 1))
	var packs []Pack
	for range 10_000 {
		p := Pack{ID: pack.Hash(fmt.Append(nil, rng.Uint64()))}
		for i := range uint32(100) {
			p.Blobs = append(p.Blobs, pack.Blob{Handle: pack.Handle{Type: pack.DataBlob, ID: pack.Hash(fmt.Append(nil, rng.Uint64()))}, Offset: i * 100, Length: 100})
		}
		packs = append(packs, p)
	}
	name := filepath.Join(b.TempDir(), "table")
	if err := os.WriteFile(name, buildTable(b, pack.ID{}, packs), 0o600); err != nil {
		b.Fatal(err)
	}
	file, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		b.Fatal(err)
	}
	table, err := OpenTable(file, info.Size())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("missing", func(b *testing.B) {
		for b.Loop() {
			if found, err := table.Find(nil, pack.Handle{Type: pack.DataBlob, ID: pack.Hash(fmt.Append(nil, rng.Uint64()))}, true); err != nil || len(found) > 0 {
				b.Fatal(found, err)
			}
		}
	})
	b.Run("present", func(b *testing.B) {
		for b.Loop() {
			h := packs[rng.IntN(len(packs))].Blobs[rng.IntN(100)].Handle
			if found, err := table.Find(nil, h, true); err != nil || len(found) == 0 {
				b.Fatal(found, err)
			}
		}
	})
}
