// SPDX-License-Identifier: BSD-2-Clause

// Package report makes a Markdown page with charts of what the benchmark
// measured. Every figure in it is computed from the rows.
package report

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dsync-backup/dsync-backup/bench/result"
)

// LoadBefore begins the case of rows that say how busy the machine was before
// an experiment; their rate is its load.
const LoadBefore = "load before "

// FileName is the report's, in the folder of the results.
const FileName = "report.md"

// Write writes the report and its charts to a folder.
func Write(dir string, rows []result.Row) error {
	page, err := Markdown(dir, rows)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, FileName), page, 0o644)
}

// Markdown makes the page, and its charts in the folder.
func Markdown(dir string, all []result.Row) ([]byte, error) {
	rows := result.Set(all)
	p := &page{rows: rows, dir: dir}
	p.printf("<!-- written by `make bench`: do not edit -->\n# What was measured\n\n")
	p.verdict()
	p.busy()
	p.machine()
	p.goals()
	p.compare("sync", "Synchronising after a change",
		"Every tool keeps a copy of its own of one tracked loop device. Random 4 KiB blocks are written; then each tool brings its copy up to date, caches dropped before each, the first of them another one in each round. \"first\" makes the copy. CPU is that of the source; read is what was read of the device (of the image file, for restic image); sent is what left the source: pack files, or both directions of rsync's pipe. Source CPU does not contain the kernel's own work for the loop device.")
	p.chartSync()
	p.compare("open", "Opening a repository", "Most of it is to derive the key from the password (scrypt); all repositories were made by restic, which chooses what takes about half a second. `--keyring` keeps the key in the kernel's keyring.")
	p.compare("fraction", "Against the fraction updated", "As the paper's figure 6: one tool after the other, after a share of all blocks was written, scattered or in a row.")
	p.chartFraction()
	p.compare("cpu", "Processor time for 10 % updated", "Alternating, each with the single parts right before and after it.")
	p.compare("cpu"+result.Parts, "Single parts around it", "As in \"What one core does\". A core's rate changes with what the host's other guests do, by a factor of two within minutes: what is compared with processor time is what was measured in the same minute.")
	p.compare("trace", "A day of a block trace, in hours", "The blocks that each hour of the trace writes are written at once, then every tool synchronises. Without the files of the MSR Cambridge traces the trace is generated, with the request counts, mix and lengths of a source control server's volume src2_0 (`bench/trace`).")
	p.chartTrace()
	p.compare("postgres", "PostgreSQL under pgbench", "The file system stays mounted and the server runs, idle while the tools read. dsync-backup and extract make a point in time of it (`--snapshot precopy`); rsync and restic read the device as it is.")
	p.compare("full", "Full backup and restore", "New repositories in each round, the same compression (auto), the same key derivation; both decode each blob again before they store it. Restores go to a new file; restic's is followed by sync, since restic does not wait for the disk; dd writes data that lie in memory.")
	p.chartFull()
	p.compare("full"+result.Parts, "Single parts around the full backups", "")
	p.compare("compression", "Modes of compression", "Full backups of data that compress 2:1 and of data that do not.")
	p.compare("scale", "The same change on larger devices", "Sparse devices, 2048 random blocks written.")
	p.compare("single", "What one core does", "In Go, on blobs of 1 MiB of 2:1 data: plaintext for each second of CPU time.")
	p.compare("device", "What the device does", "")
	p.compare("overhead", "What tracking costs writes", "fio writes for a while with the tracker and for a while without, in turns.")
	p.overhead()
	return p.out.Bytes(), p.err
}

type page struct {
	rows result.Set
	dir  string
	out  bytes.Buffer
	err  error
}

func (p *page) printf(format string, args ...any) { fmt.Fprintf(&p.out, format, args...) }

// verdict is the first paragraph: where we lose.
func (p *page) verdict() {
	var failed, open int
	for _, g := range Goals(p.rows) {
		switch g.Verdict {
		case Fail:
			failed++
		case Unknown:
			open++
		}
	}
	losses := Losses(p.rows)
	switch {
	case len(losses) > 0:
		p.printf("**dsync-backup loses in %d cases:** %s. ", len(losses), strings.Join(losses, "; "))
	default:
		p.printf("No tool was faster than dsync-backup in any case that was measured. ")
	}
	p.printf("Of the goals below, %d fail and %d were not measured.\n\n", failed, open)
	sizes := result.Distinct(p.rows.Select(func(r result.Row) bool { return r.Experiment == "sync" }), func(r result.Row) int64 { return r.Size })
	if len(sizes) > 0 {
		names := make([]string, len(sizes))
		for i, s := range sizes {
			names[i] = gib(s)
		}
		p.printf("The tools were compared on states of %s. Figures are medians; in brackets the least and the greatest.\n\n", strings.Join(names, ", "))
	}
}

// busy says so if the machine did other things as well.
func (p *page) busy() {
	most := p.rows.Select(func(r result.Row) bool {
		return r.Experiment == "about" && strings.HasPrefix(r.Case, LoadBefore)
	}).Of(result.Rate)
	if n := cores(p.rows); most.N > 0 && n > 0 && most.Max > float64(n)/2 {
		p.printf("**The machine was not idle:** before an experiment its load was up to %.1f on %d cores. Times are too long, all tools' alike; ratios within a round hold roughly, and what waits for a disk or a core that others use is told worse than it is.\n\n", most.Max, n)
	}
}

func (p *page) machine() {
	p.printf("## The machine\n\n| | |\n|---|---|\n")
	for _, r := range p.rows {
		if r.Experiment == "about" {
			p.printf("| %s | %s |\n", cell(r.Case), cell(r.Tool))
		}
	}
	p.printf("\n")
}

func (p *page) goals() {
	p.printf("## What must hold\n\nOn 8 GiB, where a size matters: on a smaller state the tools that read all of it lose less.\n\n| | goal | measured | |\n|---|---|---|---|\n")
	for _, g := range Goals(p.rows) {
		p.printf("| %d | %s | %s | %s |\n", g.Number, g.Text, g.Have, g.Verdict)
	}
	p.printf("\n")
}

// column is a column of a table: where it has no figure at all it is left out.
type column struct {
	name   string
	number func(result.Row) float64
	show   func(float64) string
}

var columns = []column{
	{"time", result.Seconds, seconds},
	{"CPU", result.SourceCPU, seconds},
	{"CPU, other end", result.OtherCPU, seconds},
	{"read", result.BytesRead, mib},
	{"sent", result.Sent, mib},
	{"stored", result.Stored, mib},
	{"memory", result.Memory, mib},
	{"rate", result.Rate, func(v float64) string { return strconv.FormatFloat(v, 'f', 0, 64) }},
}

// compare prints an experiment's table.
func (p *page) compare(name, title, text string) {
	rows := p.rows.Select(func(r result.Row) bool { return r.Experiment == name })
	if len(rows) == 0 {
		return
	}
	p.printf("## %s\n\n", title)
	if text != "" {
		p.printf("%s\n\n", text)
	}
	var used []column
	for _, c := range columns {
		if rows.Of(c.number).N > 0 {
			used = append(used, c)
		}
	}
	p.printf("| state | case | tool |")
	for _, c := range used {
		p.printf(" %s |", c.name)
	}
	p.printf("\n|---|---|---|%s\n", strings.Repeat("---:|", len(used)))
	for _, k := range keys(rows) {
		some := rows.Select(func(r result.Row) bool { return r.Key() == k })
		p.printf("| %s | %s | %s |", gib(k.Size), cell(k.Case), cell(k.Tool))
		for _, c := range used {
			s := some.Of(c.number)
			switch {
			case s.N == 0:
				p.printf(" |")
			case (c.name == "time" || c.name == "rate") && s.N > 1:
				p.printf(" %s (%s–%s)%s |", c.show(s.Median), c.show(s.Min), c.show(s.Max), unit(c, some[0]))
			default:
				p.printf(" %s%s |", c.show(s.Median), unit(c, some[0]))
			}
		}
		p.printf("\n")
	}
	p.printf("\n")
}

// cell is text inside of a table.
func cell(s string) string { return strings.ReplaceAll(s, "|", "\\|") }

func unit(c column, r result.Row) string {
	if c.name == "rate" && r.Unit != "" {
		return " " + r.Unit
	}
	return ""
}

// overhead says what share of the rate tracking costs.
func (p *page) overhead() {
	rows := p.rows.Select(func(r result.Row) bool { return r.Experiment == "overhead" })
	for _, what := range result.Distinct(rows, func(r result.Row) string { return r.Case }) {
		on, off := of(rows, "overhead", what, "tracked, eBPF").Of(result.Rate), of(rows, "overhead", what, "not tracked").Of(result.Rate)
		if on.N > 0 && off.N > 0 {
			p.printf("%s: tracked at %.1f %% of the rate without.\n\n", strings.ToUpper(what[:1])+what[1:], 100*on.Median/off.Median)
		}
	}
}

func cores(rows result.Set) int {
	for _, r := range rows {
		if r.Experiment == "about" && r.Case == "cores" {
			n, _ := strconv.Atoi(r.Tool)
			return n
		}
	}
	return 0
}

func gib(n int64) string {
	switch {
	case n < 0:
		return ""
	case n >= 1<<40:
		return fmt.Sprintf("%g TiB", float64(n)/(1<<40))
	case n >= 1<<30:
		return fmt.Sprintf("%g GiB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%g MiB", float64(n)/(1<<20))
}

func mib(v float64) string {
	if v < 100<<20 {
		return fmt.Sprintf("%.1f MiB", v/(1<<20))
	}
	return fmt.Sprintf("%.0f MiB", v/(1<<20))
}

func seconds(v float64) string { return fmt.Sprintf("%.2f s", v) }
