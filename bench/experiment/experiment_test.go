// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/bench/contender"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

func TestDirtyBytesAreReadFromTrackStatus(t *testing.T) {
	n, err := dirtyBytes([]byte(`[{"device":"/dev/loop0","tracker":"bpf","block_size":4096,"dirty_blocks":3,"reliable":true}]`))
	if err != nil || n != 12288 {
		t.Errorf("%d, %v", n, err)
	}
	for _, bad := range []string{"", "[]", "{}"} {
		if _, err := dirtyBytes([]byte(bad)); err == nil {
			t.Errorf("%q is read", bad)
		}
	}
}

func TestExperimentsNameToolsThatExist(t *testing.T) {
	for _, names := range [][]string{fractionTools, traceTools, postgresTools, Quick.Tools, Full.Tools} {
		for _, n := range names {
			if !slices.Contains(contender.Names, n) {
				t.Errorf("%q", n)
			}
		}
	}
}

func TestSingleMeasuresEachPart(t *testing.T) {
	var rows result.Set
	b := &Bench{Scale: Scale{Rounds: 1}, Add: func(r result.Row) error { rows = append(rows, r); return nil }, Log: t.Logf}
	if err := runSingle(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if len(rows) != 5 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, r := range rows {
		if r.Rate < 1 || r.Unit != "MB/s" {
			t.Errorf("%+v", r)
		}
	}
}

func TestATraceOfNoFileIsGenerated(t *testing.T) {
	b := &Bench{Scale: Scale{Size: 64 << 20, Hours: 2}}
	hours, err := b.hours()
	if err != nil || len(hours) != 2 || len(hours[0]) == 0 || slices.Max(hours[0]) >= 64<<20/4096 {
		t.Errorf("%d hours, %v", len(hours), err)
	}
	b.Trace = "/nowhere"
	if _, err := b.hours(); err == nil {
		t.Error("a missing file is not noticed")
	}
}
