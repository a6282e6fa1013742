// SPDX-License-Identifier: BSD-2-Clause

package index

import (
	"bytes"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/pack"
)

func TestOnlyListedIndexFilesCountInAMergedTable(t *testing.T) {
	rng := newRand(t)
	packs := map[pack.ID][]Pack{}
	var tables []*Table
	for i := range 12 {
		id := pack.ID{byte(i + 1)}
		packs[id] = randomPacks(rng, rng.IntN(20), 30)
		tables = append(tables, open(t, buildTable(t, id, packs[id])))
	}
	merge := func(tables []*Table) *Table {
		var buf bytes.Buffer
		if err := MergeTables(&buf, tables); err != nil {
			t.Fatal(err)
		}
		return open(t, buf.Bytes())
	}
	check := func(table *Table, gone func(pack.ID) bool) {
		t.Helper()
		m := model{}
		for id, p := range packs {
			if !gone(id) {
				m.add(p)
			}
		}
		m.check(t, table)
	}
	none := func(pack.ID) bool { return false }
	odd := func(id pack.ID) bool { return id[0]%2 == 1 }
	merged := merge(tables)
	check(merged, none)

	if live := merged.Retain(func(id pack.ID) bool { return !odd(id) }); live != 6 {
		t.Errorf("%d index files are live, want 6", live)
	}
	check(merged, odd)

	// What is merged again loses what is gone for good.
	for _, id := range slices.Collect(mapKeys(packs)) {
		if odd(id) {
			delete(packs, id)
		}
	}
	extra := pack.ID{100}
	packs[extra] = randomPacks(rng, 5, 30)
	again := merge([]*Table{merged, open(t, buildTable(t, extra, packs[extra]))})
	check(again, none)
	if n := len(again.sources); n != 7 {
		t.Errorf("%d index files in the merged table, want 7", n)
	}
}

func mapKeys[K comparable, V any](m map[K]V) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}
