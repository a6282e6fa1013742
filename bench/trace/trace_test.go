// SPDX-License-Identifier: BSD-2-Clause

package trace

import (
	"bytes"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

// The lines are of the published format.
const sample = `128166372003061629,usr,0,Read,7014609920,24576,41286
128166372016382155,usr,0,Write,1317441536,8192,1963
128166408003061629,usr,1,Write,4095,2,10
`

func TestReaderReadsThePublishedFormat(t *testing.T) {
	r := NewReader(strings.NewReader(sample))
	var got []Event
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	want := []Event{
		{0, "usr", 0, false, 7014609920, 24576, 4128600 * time.Nanosecond},
		{1332052600 * time.Nanosecond, "usr", 0, true, 1317441536, 8192, 196300 * time.Nanosecond},
		{time.Hour, "usr", 1, true, 4095, 2, 1000 * time.Nanosecond},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

func TestReaderNamesTheBadLine(t *testing.T) {
	for _, bad := range []string{"x", "1,2,3,Read,5,6", "1,h,0,Trim,0,0,0", "1,h,0,Read,-1,0,0", "1,h,0,Write,9223372036854775807,9,0", "-1,h,0,Read,0,0,0", "1,h,0,Read,0,0,0,0"} {
		r := NewReader(strings.NewReader(sample + bad + "\n"))
		var err error
		for err == nil {
			_, err = r.Next()
		}
		if errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "line 4") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(sample)
	f.Fuzz(func(t *testing.T, text string) {
		r := NewReader(strings.NewReader(text))
		for {
			e, err := r.Next()
			if err != nil {
				return
			}
			if e.Time < 0 || e.Offset < 0 || e.Length < 0 || e.Offset+e.Length < 0 {
				t.Fatalf("%+v", e)
			}
		}
	})
}

func TestHoursCountBlocksOnceAndFoldThem(t *testing.T) {
	// 4095+2 bytes touch two blocks; 1317441536 is block 321641.
	got, err := Hours(NewReader(strings.NewReader(sample)).Next, 1000*BlockSize, 2)
	if err != nil || len(got) != 2 || !slices.Equal(got[0], []int64{641, 642}) || !slices.Equal(got[1], []int64{0, 1}) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestGeneratedTracesAreWhatTheirProfileSays(t *testing.T) {
	for _, p := range Profiles {
		t.Run(p.Name, func(t *testing.T) {
			p.Requests /= 8
			g := NewGenerator(p, 1)
			var n, writes int
			var writeBytes, last int64
			hours := make([]float64, 24)
			written := map[int64]bool{}
			for {
				e, err := g.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if e.Time < time.Duration(last) || e.Offset < 0 || e.Offset+e.Length > p.Span || e.Length%512 != 0 {
					t.Fatalf("%+v", e)
				}
				last = int64(e.Time)
				n++
				hours[e.Time/time.Hour]++
				if e.Write {
					writes++
					writeBytes += e.Length
					written[e.Offset/BlockSize] = true
				}
			}
			near := func(what string, got, want, within float64) {
				if math.Abs(got-want) > within*want {
					t.Errorf("%s: %.4g, want %.4g", what, got, want)
				}
			}
			near("requests", float64(n), float64(p.Requests), 0.01)
			near("share of writes", float64(writes)/float64(n), p.WriteShare, 0.02)
			near("mean write", float64(writeBytes)/float64(writes), float64(p.WriteBytes), 0.05)
			slices.Sort(hours)
			near("busiest hour to the middle one", hours[23]/hours[12], p.PeakToMedian, 0.1)
			if limit := p.WorkingSet * float64(p.Span/BlockSize) * 1.6; float64(len(written)) > limit {
				t.Errorf("%d blocks are written to, the working set has %.0f", len(written), limit)
			}
		})
	}
}

func TestWhatIsGeneratedReadsBack(t *testing.T) {
	p := Profiles[2]
	p.Requests = 2000
	var csv bytes.Buffer
	if err := WriteCSV(&csv, NewGenerator(p, 5).Next); err != nil {
		t.Fatal(err)
	}
	a, err := Hours(NewReader(&csv).Next, 1<<30, 24)
	if err != nil {
		t.Fatal(err)
	}
	var total int
	for _, h := range a {
		total += len(h)
	}
	if total < 500 {
		t.Errorf("%d blocks in a day of %d requests", total, p.Requests)
	}
	// The same seed, the same day.
	var again bytes.Buffer
	if err := WriteCSV(&again, NewGenerator(p, 5).Next); err != nil {
		t.Fatal(err)
	}
	b, err := Hours(NewReader(&again).Next, 1<<30, 24)
	if err != nil || len(b) != len(a) || !slices.EqualFunc(a, b, func(x, y []int64) bool { return slices.Equal(x, y) }) {
		t.Errorf("another day for the same seed: %v", err)
	}
}
