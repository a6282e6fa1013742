// SPDX-License-Identifier: BSD-2-Clause

package result

import (
	"bytes"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func sample() []Row {
	a := Unknown()
	a.Experiment, a.Case, a.Tool, a.Round, a.Seconds, a.Size = "sync", `random, "1 %"`, "x", 1, 1.5, 2<<30
	b := a
	b.Round, b.Seconds, b.Memory = 2, 2.5, 0
	return []Row{a, b}
}

func TestRowsSurviveTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.csv")
	if rows, err := Load(path); err != nil || rows != nil {
		t.Fatalf("no file: %v, %v", rows, err)
	}
	if err := Save(path, sample()); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path)
	if err != nil || !reflect.DeepEqual(got, sample()) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestDamagedFilesAreRefused(t *testing.T) {
	var b bytes.Buffer
	if err := Write(&b, sample()); err != nil {
		t.Fatal(err)
	}
	good := b.String()
	for _, bad := range []string{"", "a,b\n", strings.Replace(good, "1.5000", "1.5x", 1), strings.Replace(good, "seconds", "minutes", 1), good + "x\n"} {
		if _, err := Read(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is read", bad)
		}
	}
}

func TestMedianAndSpread(t *testing.T) {
	var s Set
	for _, v := range []float64{5, -1, 1, 3} {
		r := Unknown()
		r.Seconds = v
		s = append(s, r)
	}
	if got := s.Of(Seconds); got != (Spread{3, 1, 5, 3}) {
		t.Errorf("odd: %+v", got)
	}
	if got := s[:3].Of(Seconds); got != (Spread{3, 1, 5, 2}) {
		t.Errorf("even: %+v", got)
	}
	if got := s.Of(Rate); got.N != 0 {
		t.Errorf("nothing measured: %+v", got)
	}
}
