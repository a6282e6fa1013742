// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// FuzzTable opens what looks like a table: checksums are mended first, so that
// what lies behind them is reached.
func FuzzTable(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", "table-v1.golden"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden, 16, uint64(5))
	f.Add(golden, 2*pageSize+32, ^uint64(0))
	f.Add(golden[:pageSize], 24, uint64(1)<<40)
	want := pack.Handle{Type: pack.DataBlob, ID: goldenPacks()[1].Blobs[0].ID}
	f.Fuzz(func(t *testing.T, data []byte, at int, value uint64) {
		data = bytes.Clone(data)
		if at >= 0 && at <= len(data)-8 {
			binary.LittleEndian.PutUint64(data[at:], value)
		}
		for p := range len(data) / pageSize {
			(*page)(data[p*pageSize:]).seal(int64(p))
		}
		table, err := OpenTable(bytes.NewReader(data), int64(len(data)))
		if err == nil {
			_, err = table.Find(nil, want, false)
		}
		if err == nil {
			err = table.Each(func(pack.Handle, Location) error { return nil })
		}
		if err == nil {
			err = MergeTables(&bytes.Buffer{}, []*Table{table, table})
		}
		if err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("not ErrDamaged: %v", err)
		}
	})
}

func FuzzFile(f *testing.F) {
	data, err := Encode(goldenPacks())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		packs, err := Decode(data)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("not ErrDamaged: %v", err)
			}
			return
		}
		again, err := Encode(packs)
		if err != nil {
			t.Fatal(err)
		}
		packs2, err := Decode(again)
		if err != nil || fmt.Sprint(packs2) != fmt.Sprint(packs) {
			t.Errorf("%v became %v, %v", packs, packs2, err)
		}
		if err := WriteTable(&bytes.Buffer{}, pack.ID{}, packs); err != nil {
			t.Error(err)
		}
	})
}
