// SPDX-License-Identifier: BSD-2-Clause

package report

import (
	"fmt"
	"math"

	"github.com/dsync-backup/dsync-backup/bench/result"
)

// Goal is something that must hold, and whether it did.
type Goal struct {
	Number  int
	Text    string
	Have    string // the figures
	Verdict Verdict
}

// Verdict is what became of a goal.
type Verdict string

// The verdicts.
const (
	Pass    Verdict = "pass"
	Fail    Verdict = "**fail**"
	Unknown Verdict = "not measured"
)

func verdict(ok bool) Verdict {
	if ok {
		return Pass
	}
	return Fail
}

const (
	ours    = "dsync-backup"
	keyring = "dsync-backup, keyring"
	restic  = "restic image"
	inPlace = "rsync in place"
	// What a disk does that reads the packs and writes the target at once.
	packsToo = "dd, and reading the packs"
)

// of picks the rows of a case, of the largest size if there are several.
func of(rows result.Set, experiment, what, tool string) result.Set {
	s := rows.Select(func(r result.Row) bool {
		return r.Experiment == experiment && r.Case == what && r.Tool == tool
	})
	var size int64 = -1
	for _, r := range s {
		size = max(size, r.Size)
	}
	return s.Select(func(r result.Row) bool { return r.Size == size })
}

// Goals are all that must hold, in their order.
func Goals(rows result.Set) []Goal {
	var out []Goal
	for _, share := range []string{"0.1 %", "1 %"} {
		out = append(out, incremental(rows, share)...)
	}
	out = append(out, cpu(rows)...)
	out = append(out, full(rows)...)
	out = append(out, restore(rows)...)
	return append(out, scale(rows)...)
}

// incremental: at least 50 times restic and 20 times rsync, or bounded by the
// device, and 1/50 of what restic stores.
func incremental(rows result.Set, share string) []Goal {
	what := "random " + share
	mine, res, rs := of(rows, "sync", what, ours), of(rows, "sync", what, restic), of(rows, "sync", what, inPlace)
	ring := of(rows, "sync", what, keyring)
	speed := func(text string, theirs result.Set, want float64) Goal {
		g := Goal{1, text, "", Unknown}
		a, b := mine.Of(result.Seconds), theirs.Of(result.Seconds)
		if a.N == 0 || b.N == 0 {
			return g
		}
		ratio := b.Median / a.Median
		g.Have = fmt.Sprintf("%.1f × (%.2f s, %.2f s) on %s", ratio, a.Median, b.Median, gib(mine[0].Size))
		if k := ring.Of(result.Seconds); k.N > 0 {
			g.Have += fmt.Sprintf("; with --keyring %.1f × (%.2f s)", b.Median/k.Median, k.Median)
			ratio = max(ratio, b.Median/k.Median)
			a = k
		}
		g.Verdict = verdict(ratio >= want)
		// Bounded by the device's random reads: they alone take most of it.
		if iops := of(rows, "device", "random reads of 4 KiB, 16 in flight", "fio").Of(result.Rate); iops.N > 0 {
			reads := float64(mine[0].Dirty) / 4096 / iops.Median
			g.Have += fmt.Sprintf("; the reads alone take %.2f s at fio's rate", reads)
			if reads >= 0.75*a.Median {
				g.Verdict = Pass
				g.Have += ", which bounds it"
			}
		}
		return g
	}
	out := []Goal{
		speed(fmt.Sprintf("incremental of %s: at least 50 × faster than restic", share), res, 50),
		speed(fmt.Sprintf("incremental of %s: at least 20 × faster than rsync --inplace", share), rs, 20),
	}
	g := Goal{1, fmt.Sprintf("incremental of %s: at most 1/50 of the bytes that restic stores", share), "", Unknown}
	if a, b := mine.Of(result.Stored), res.Of(result.Stored); a.N > 0 && b.N > 0 {
		g.Have = fmt.Sprintf("1/%.0f (%s, %s)", b.Median/a.Median, mib(a.Median), mib(b.Median))
		g.Verdict = verdict(b.Median >= 50*a.Median)
	}
	return append(out, g)
}

// single is a rate of one core, in bytes a second; NaN if it was not measured.
func single(rows result.Set, part string) float64 {
	s := of(rows, "single", "1 MiB blobs", part).Of(result.Rate)
	if s.N == 0 {
		return math.NaN()
	}
	return s.Median * 1e6
}

// around is the seconds of one core that parts of the work took for a GiB before and after the
// given round of a case; NaN if they were not measured.
func around(rows result.Set, experiment, what string, round int, parts ...string) (seconds float64) {
	for _, part := range parts {
		s := rows.Select(func(r result.Row) bool {
			return r.Experiment == experiment+result.Parts && r.Case == what && r.Round == round && r.Tool == part
		}).Of(func(r result.Row) float64 { return (1 << 30) / (r.Rate * 1e6) })
		if s.N == 0 {
			return math.NaN()
		}
		seconds += (s.Min + s.Max) / 2
	}
	return seconds
}

// needed are the parts that each byte needs.
var needed = []string{"SHA-256", "zstd", "AES-CTR and Poly1305, of the compressed"}

// opening is the seconds that opening a repository takes, mostly to derive the
// key; they are told apart.
func opening(rows result.Set) float64 {
	s := of(rows, "open", "snapshots of an empty repository", ours).Of(result.SourceCPU)
	return max(0, s.Median)
}

// cpu: seconds for each dirty GiB, against the sum of what must be done.
func cpu(rows result.Set) []Goal {
	var out []Goal
	for _, c := range []struct{ experiment, what, text string }{
		{"cpu", "random 10 %", "scattered blocks (random 10 %)"},
		{"cpu", "sequential 10 %", "blocks in a row (sequential 10 %)"},
		{"full", "backup", "full backup"},
	} {
		g := Goal{2, "CPU seconds for a GiB of " + c.text + ": at most 1.25 × the sum of SHA-256, zstd, AES and Poly1305", "", Unknown}
		var have, want, ratio []float64
		for _, r := range of(rows, c.experiment, c.what, ours) {
			took := (r.SourceCPU - opening(rows)) / (float64(r.Dirty) / (1 << 30))
			sum := around(rows, c.experiment, c.what, r.Round, needed...)
			if !math.IsNaN(took / sum) {
				have, want, ratio = append(have, took), append(want, sum), append(ratio, took/sum)
			}
		}
		if len(ratio) > 0 {
			s := result.SpreadOf(ratio)
			g.Have = fmt.Sprintf("%.2f × (%.1f s, sum %.1f s, medians of %d rounds; each round against the sum around it: %.2f to %.2f; opening the repository, %.2f s, apart)",
				s.Median, result.SpreadOf(have).Median, result.SpreadOf(want).Median, s.N, s.Min, s.Max, opening(rows))
			g.Verdict = verdict(s.Median <= 1.25)
		}
		out = append(out, g)
	}
	return out
}

func full(rows result.Set) []Goal {
	mine, res := of(rows, "full", "backup", ours), of(rows, "full", "backup", restic)
	a, b := mine.Of(result.Rate), res.Of(result.Rate)
	g := Goal{3, "full backup: at least 1.5 × restic's throughput", "", Unknown}
	h := Goal{3, "full backup: at least 90 % of what the cores allow by the sum above and chunking", "", Unknown}
	if a.N > 0 && b.N > 0 {
		g.Have = fmt.Sprintf("%.2f × (%.0f MB/s, %.0f MB/s) on %s", a.Median/b.Median, a.Median, b.Median, gib(mine[0].Size))
		g.Verdict = verdict(a.Median >= 1.5*b.Median)
	}
	var bounds, share, left []float64
	for _, r := range mine {
		bound := 1e-6 * float64(cores(rows)) * (1 << 30) / around(rows, "full", "backup", r.Round, append([]string{"chunking"}, needed...)...)
		if math.IsNaN(bound) || bound <= 0 {
			continue
		}
		bounds, share = append(bounds, bound), append(share, r.Rate/bound)
		// The sum is of processor time, and so is what the hypervisor leaves.
		stolen := 0.0
		if r.Stolen > 0 {
			stolen = r.Stolen / float64(cores(rows)) / r.Seconds
		}
		left = append(left, r.Rate/bound/(1-stolen))
	}
	if len(share) > 0 {
		s, l := result.SpreadOf(share), result.SpreadOf(left)
		h.Have = fmt.Sprintf("%.0f %% (%.0f MB/s of %.0f MB/s, medians; each round against the sum around it: %.0f to %.0f %%)",
			100*s.Median, a.Median, result.SpreadOf(bounds).Median, 100*s.Min, 100*s.Max)
		if l.Median > s.Median {
			h.Have += fmt.Sprintf("; %.0f %% of what the hypervisor left of the cores", 100*l.Median)
		}
		h.Verdict = verdict(l.Median >= 0.9)
	}
	return []Goal{g, h}
}

func restore(rows result.Set) []Goal {
	mine := of(rows, "full", "restore", ours)
	a := mine.Of(result.Rate)
	g := Goal{4, "restore: at least 0.9 × dd oflag=direct, or bounded by decompression on all cores, or by a disk that has packs and target", "", Unknown}
	h := Goal{4, "restore: faster than restic", "", Unknown}
	if b := of(rows, "full", "restore", "dd oflag=direct").Of(result.Rate); a.N > 0 && b.N > 0 {
		g.Have = fmt.Sprintf("%.2f × (%.0f MB/s, %.0f MB/s)", a.Median/b.Median, a.Median, b.Median)
		ok := a.Median >= 0.9*b.Median
		if u := single(rows, "unzstd"); !ok && !math.IsNaN(u) {
			bound := float64(cores(rows)) * u / 1e6
			g.Have += fmt.Sprintf("; decompression on all cores allows %.0f MB/s", bound)
			ok = a.Median >= 0.75*bound
		}
		if d := of(rows, "full", "restore", packsToo).Of(result.Rate); !ok && d.N > 0 {
			g.Have += fmt.Sprintf("; dd that has the packs read meanwhile reaches %.0f MB/s", d.Median)
			if ok = a.Median >= 0.9*d.Median; ok {
				g.Have += ", which bounds it"
			}
		}
		g.Verdict = verdict(ok)
	}
	if b := of(rows, "full", "restore", restic).Of(result.Rate); a.N > 0 && b.N > 0 {
		h.Have = fmt.Sprintf("%.2f × (%.0f MB/s, %.0f MB/s)", a.Median/b.Median, a.Median, b.Median)
		h.Verdict = verdict(a.Median > b.Median)
	}
	return []Goal{g, h}
}

func scale(rows result.Set) []Goal {
	g := Goal{5, "the same blocks on 4 TiB take less than 1.2 × as long as on 2 GiB", "", Unknown}
	h := Goal{5, "and no more memory than the bitmap, 128 MiB", "", Unknown}
	at := func(size int64) result.Set {
		return rows.Select(func(r result.Row) bool {
			return r.Experiment == "scale" && r.Case != "first" && r.Tool == ours && r.Size == size
		})
	}
	small, large := at(2<<30), at(4<<40)
	if a, b := small.Of(result.Seconds), large.Of(result.Seconds); a.N > 0 && b.N > 0 {
		g.Have = fmt.Sprintf("%.2f × (%.3f s, %.3f s)", b.Median/a.Median, b.Median, a.Median)
		g.Verdict = verdict(b.Median < 1.2*a.Median)
		m, n := small.Of(result.Memory), large.Of(result.Memory)
		h.Have = fmt.Sprintf("%s more (%s, %s)", mib(n.Median-m.Median), mib(n.Median), mib(m.Median))
		h.Verdict = verdict(n.Median-m.Median <= 128<<20)
	}
	return []Goal{g, h}
}

// Losses are the cases in which another tool took less time than dsync-backup,
// in words.
func Losses(rows result.Set) []string {
	var out []string
	for _, k := range keys(rows) {
		if k.Tool == ours || k.Tool == keyring || k.Tool == "dsync-backup, MinIO" || k.Tool == "extract | merge" {
			continue
		}
		switch k.Experiment {
		case "sync", "fraction", "trace", "postgres", "full":
		default:
			continue
		}
		if k.Tool == "dd, only reading" || k.Tool == packsToo {
			continue // bounds, not contenders
		}
		pick := func(tool string) result.Spread {
			return rows.Select(func(r result.Row) bool {
				return r.Experiment == k.Experiment && r.Case == k.Case && r.Size == k.Size && r.Tool == tool
			}).Of(result.Seconds)
		}
		mine, theirs := pick(ours), pick(k.Tool)
		if mine.N > 0 && theirs.N > 0 && theirs.Median < mine.Median {
			out = append(out, fmt.Sprintf("%s, %s, %s: %s took %.2f s, dsync-backup %.2f s", k.Experiment, k.Case, gib(k.Size), k.Tool, theirs.Median, mine.Median))
		}
	}
	return out
}

// keys are the distinct things that were measured, in their order.
func keys(rows result.Set) []result.Key {
	var out []result.Key
	seen := map[result.Key]bool{}
	for _, r := range rows {
		if k := r.Key(); !seen[k] {
			seen[k] = true
			out = append(out, k)
		}
	}
	return out
}
