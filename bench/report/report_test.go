// SPDX-License-Identifier: BSD-2-Clause

package report

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/bench/result"
)

func row(experiment, what, tool string, size int64, change func(*result.Row)) result.Row {
	r := result.Unknown()
	r.Experiment, r.Case, r.Tool, r.Size = experiment, what, tool, size
	if change != nil {
		change(&r)
	}
	return r
}

func took(s float64) func(*result.Row) { return func(r *result.Row) { r.Seconds = s } }

// winning are rows of a run in which every goal is met.
func winning() []result.Row {
	const size = 8 << 30
	rate := func(v float64, unit string) func(*result.Row) {
		return func(r *result.Row) { r.Rate, r.Unit, r.Seconds, r.SourceCPU, r.Dirty = v, unit, size/1e6/v, 60, size }
	}
	rows := []result.Row{
		row("about", "cores", "2", -1, nil),
		row("single", "1 MiB blobs", "SHA-256", -1, rate(2000, "MB/s")),
		row("single", "1 MiB blobs", "zstd", -1, rate(150, "MB/s")),
		row("single", "1 MiB blobs", "AES-CTR and Poly1305, of the compressed", -1, rate(4000, "MB/s")),
		row("single", "1 MiB blobs", "unzstd", -1, rate(900, "MB/s")),
		row("single", "1 MiB blobs", "chunking", -1, rate(600, "MB/s")),
		row("open", "snapshots of an empty repository", ours, -1, func(r *result.Row) { r.Seconds, r.SourceCPU = 0.5, 0.5 }),
		row("full", "backup", ours, size, rate(250, "MB/s")),
		row("full", "backup", restic, size, rate(110, "MB/s")),
		row("full", "restore", ours, size, rate(700, "MB/s")),
		row("full", "restore", restic, size, rate(500, "MB/s")),
		row("full", "restore", "dd oflag=direct", size, rate(690, "MB/s")),
		row("full", "restore", packsToo, size, rate(600, "MB/s")),
	}
	for _, what := range []string{"random 0.1 %", "random 1 %"} {
		for tool, f := range map[string][3]float64{ours: {0.7, 0.6, 4e6}, inPlace: {20, 10, 9e6}, restic: {40, 60, 1.5e9}} {
			rows = append(rows, row("sync", what, tool, size, func(r *result.Row) {
				r.Seconds, r.SourceCPU, r.Stored, r.Sent, r.Dirty = f[0], f[1], int64(f[2]), int64(f[2]), 8<<20
			}))
		}
	}
	for _, what := range []string{"random 1 %", "random 10 %", "sequential 1 %", "sequential 10 %"} {
		rows = append(rows, row("fraction", what, ours, 1<<30, func(r *result.Row) { r.Seconds, r.SourceCPU, r.Dirty = 1, 1.2, 100<<20 }))
	}
	// Three rounds of which the second meets a processor half as fast; parts before and after.
	parts := func(experiment, what string, slower float64, round int) {
		for tool, r := range map[string]float64{
			"SHA-256": 2000, "zstd": 150, "AES-CTR and Poly1305, of the compressed": 4000, "unzstd": 900, "chunking": 600,
		} {
			for _, v := range []float64{r / slower, r / slower} {
				rows = append(rows, row(experiment+result.Parts, what, tool, -1, func(r *result.Row) { r.Rate, r.Unit, r.Round = v, "MB/s", round }))
			}
		}
	}
	parts("full", "backup", 1, 0)
	for round, slower := range []float64{1, 2, 1} {
		for _, what := range []string{"random 10 %", "sequential 10 %"} {
			parts("cpu", what, slower, round)
			rows = append(rows, row("cpu", what, ours, 2<<30, func(r *result.Row) { r.SourceCPU, r.Dirty, r.Round = 0.5+0.7*slower, 100<<20, round }))
		}
	}
	for _, s := range []int64{2 << 30, 4 << 40} {
		rows = append(rows, row("scale", "2048 blocks", ours, s, func(r *result.Row) { r.Seconds, r.Memory = 0.8, 60<<20 }))
	}
	for _, h := range []string{"hour 00", "hour 01"} {
		rows = append(rows, row("trace", h, ours, 1<<30, took(0.5)))
	}
	return rows
}

func TestARunThatMeetsEveryGoalPasses(t *testing.T) {
	for _, g := range Goals(winning()) {
		if g.Verdict != Pass {
			t.Errorf("%d, %s: %s: %s", g.Number, g.Text, g.Verdict, g.Have)
		}
	}
}

// Each goal fails when what it speaks of is too slow, and only then.
func TestEachGoalFailsWhenItIsMissed(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*result.Row)
		fail   []string
	}{
		{"slow increment", func(r *result.Row) {
			if r.Experiment == "sync" && r.Case == "random 1 %" && r.Tool == ours {
				r.Seconds = 1.01
			}
		}, []string{"incremental of 1 %: at least 50 × faster than restic", "incremental of 1 %: at least 20 × faster than rsync --inplace"}},
		{"stores too much", func(r *result.Row) {
			if r.Experiment == "sync" && r.Tool == ours {
				r.Stored = 31e6
			}
		}, []string{"incremental of 0.1 %: at most 1/50", "incremental of 1 %: at most 1/50"}},
		{"CPU", func(r *result.Row) {
			if r.Experiment == "cpu" && r.Case == "random 10 %" {
				r.SourceCPU += 0.4
			}
		}, []string{"CPU seconds for a GiB of scattered"}},
		{"full", func(r *result.Row) {
			if r.Experiment == "full" && r.Case == "backup" && r.Tool == ours {
				r.Rate = 164
			}
		}, []string{"full backup: at least 1.5", "full backup: at least 90 %"}},
		{"full, on cores of one's own", func(r *result.Row) {
			if r.Experiment == "full" && r.Case == "backup" && r.Tool == ours {
				r.Rate, r.Stolen = 180, 0
			}
		}, []string{"full backup: at least 90 %"}},
		{"full, on shared cores", func(r *result.Row) {
			if r.Experiment == "full" && r.Case == "backup" && r.Tool == ours {
				r.Rate, r.Stolen = 180, 0.12*2*r.Seconds
			}
		}, nil},
		{"restore", func(r *result.Row) {
			if r.Experiment == "full" && r.Case == "restore" && r.Tool == ours {
				r.Rate = 490
			}
		}, []string{"restore: at least 0.9", "restore: faster than restic"}},
		{"restore as fast as the disk allows", func(r *result.Row) {
			if r.Experiment == "full" && r.Case == "restore" && r.Tool == ours {
				r.Rate = 545
			}
		}, nil},
		{"scale", func(r *result.Row) {
			if r.Experiment == "scale" && r.Size == 4<<40 {
				r.Seconds, r.Memory = 1, 200<<20
			}
		}, []string{"the same blocks on 4 TiB", "and no more memory"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rows := winning()
			for i := range rows {
				c.change(&rows[i])
			}
			var failed []string
			for _, g := range Goals(rows) {
				if g.Verdict == Fail {
					failed = append(failed, g.Text)
				}
			}
			if len(failed) != len(c.fail) {
				t.Fatalf("failed: %q", failed)
			}
			for i := range failed {
				if !strings.HasPrefix(failed[i], c.fail[i]) {
					t.Errorf("failed: %q, want %q", failed[i], c.fail[i])
				}
			}
		})
	}
}

func TestWhatWasNotMeasuredIsNotPassed(t *testing.T) {
	for _, g := range Goals(nil) {
		if g.Verdict != Unknown {
			t.Errorf("%s: %s", g.Text, g.Verdict)
		}
	}
}

func TestTheFirstParagraphSaysWhereWeLose(t *testing.T) {
	rows := winning()
	page, err := Markdown(t.TempDir(), rows)
	if err != nil {
		t.Fatal(err)
	}
	if p := paragraph(page); !strings.Contains(p, "No tool was faster") {
		t.Errorf("%q", p)
	}
	rows = append(rows, row("trace", "hour 00", inPlace, 1<<30, took(0.4)))
	if page, err = Markdown(t.TempDir(), rows); err != nil {
		t.Fatal(err)
	}
	if p := paragraph(page); !strings.Contains(p, "loses in 1 cases") || !strings.Contains(p, "rsync in place took 0.40 s, dsync-backup 0.50 s") {
		t.Errorf("%q", p)
	}
}

func TestABusyMachineIsSaid(t *testing.T) {
	for load, want := range map[float64]bool{0.3: false, 9: true} {
		page, err := Markdown(t.TempDir(), append(winning(), row("about", LoadBefore+"sync", "", -1, func(r *result.Row) { r.Rate = load })))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(page), "The machine was not idle"); got != want {
			t.Errorf("a load of %g: said %v", load, got)
		}
	}
}

// paragraph is the first one after the title.
func paragraph(page []byte) string {
	_, rest, _ := strings.Cut(string(page), "# What was measured\n\n")
	p, _, _ := strings.Cut(rest, "\n\n")
	return p
}

func TestChartsThatThePageNamesAreThereAndAreSVG(t *testing.T) {
	dir := t.TempDir()
	if err := Write(dir, winning()); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil {
		t.Fatal(err)
	}
	charts := regexp.MustCompile(`\]\(([^)]+\.svg)\)`).FindAllSubmatch(page, -1)
	if len(charts) < 6 {
		t.Errorf("%d charts", len(charts))
	}
	for _, c := range charts {
		f, err := os.Open(filepath.Join(dir, string(c[1])))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		elements := 0
		for d := xml.NewDecoder(f); ; {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", c[1], err)
			}
			if e, ok := token.(xml.StartElement); ok {
				if elements == 0 && e.Name.Local != "svg" {
					t.Errorf("%s begins with %s", c[1], e.Name.Local)
				}
				elements++
			}
		}
		if elements < 20 {
			t.Errorf("%s has %d elements", c[1], elements)
		}
	}
	for _, want := range []string{"## The machine", "## What must hold", "| 8 GiB | random 0.1 % | dsync-backup |"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}
