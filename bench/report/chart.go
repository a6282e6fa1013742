// SPDX-License-Identifier: BSD-2-Clause

package report

import (
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"

	"github.com/dsync-backup/dsync-backup/bench/result"
)

// save writes a chart as SVG and points to it on the page.
func (p *page) save(chart *plot.Plot, name, alt string, width, height vg.Length) {
	if p.err != nil {
		return
	}
	if err := chart.Save(width, height, filepath.Join(p.dir, name)); err != nil {
		p.err = fmt.Errorf("chart %s: %w", name, err)
		return
	}
	p.printf("![%s](%s)\n\n", alt, name)
}

func newChart(title, x, y string) *plot.Plot {
	c := plot.New()
	c.Title.Text, c.X.Label.Text, c.Y.Label.Text = title, x, y
	c.Title.Padding = vg.Points(6)
	c.Add(plotter.NewGrid())
	c.Legend.Top = true
	return c
}

// logarithmic gives the y axis a logarithmic scale.
func logarithmic(c *plot.Plot) {
	c.Y.Scale = logScale{}
	c.Y.Tick.Marker = plot.LogTicks{Prec: -1}
}

// logScale is logarithmic, and puts what is less than its least value there: a
// bar begins at 0.
type logScale struct{}

// Normalize gives the place of x between least (0) and most (1).
func (logScale) Normalize(least, most, x float64) float64 {
	x = max(x, least)
	return math.Log(x/least) / math.Log(most/least)
}

// chartSync has bars: one group for each share, one bar for each tool.
func (p *page) chartSync() {
	rows := p.rows.Select(func(r result.Row) bool { return r.Experiment == "sync" && strings.HasPrefix(r.Case, "random") })
	for _, size := range result.Distinct(rows, func(r result.Row) int64 { return r.Size }) {
		some := rows.Select(func(r result.Row) bool { return r.Size == size })
		p.bars(some, result.Seconds, fmt.Sprintf("time to synchronise %s", gib(size)), "seconds (logarithmic)", fmt.Sprintf("sync-%d-time.svg", size>>30), true)
		p.bars(some, result.Sent, fmt.Sprintf("bytes sent for %s", gib(size)), "MiB (logarithmic)", fmt.Sprintf("sync-%d-sent.svg", size>>30), true)
		p.bars(some, result.SourceCPU, fmt.Sprintf("CPU of the source, %s", gib(size)), "seconds (logarithmic)", fmt.Sprintf("sync-%d-cpu.svg", size>>30), true)
	}
}

func (p *page) chartFull() {
	rows := p.rows.Select(func(r result.Row) bool { return r.Experiment == "full" })
	p.bars(rows, result.Rate, "full backup and restore", "MB/s", "full.svg", false)
}

// bars draws the tools' medians, in groups by case.
func (p *page) bars(rows result.Set, number func(result.Row) float64, title, axis, file string, logs bool) {
	cases := result.Distinct(rows, func(r result.Row) string { return r.Case })
	tools := result.Distinct(rows, func(r result.Row) string { return r.Tool })
	if len(cases) == 0 || p.err != nil {
		return
	}
	c := newChart(title, "", axis)
	least := 0.0
	if logs {
		logarithmic(c)
		least = 0.01
	}
	width := vg.Points(min(14, 300/float64(len(tools)*len(cases))))
	for i, tool := range tools {
		v := make(plotter.Values, len(cases))
		for j, what := range cases {
			m := of(rows, rows[0].Experiment, what, tool).Of(number).Median
			if strings.HasPrefix(axis, "MiB") {
				m /= 1 << 20
			}
			v[j] = max(m, least)
		}
		b, err := plotter.NewBarChart(v, width)
		if err != nil {
			p.err = err
			return
		}
		b.Color, b.LineStyle.Width = plotutil.Color(i), 0
		b.Offset = width * vg.Length(float64(i)-float64(len(tools)-1)/2)
		c.Add(b)
		c.Legend.Add(tool, b)
	}
	c.NominalX(cases...)
	c.X.Min, c.X.Max = -0.5, float64(len(cases))-0.5
	// Room for the legend.
	if logs {
		c.Y.Min = least
		c.Y.Max *= 100
	} else {
		c.Y.Min = 0
		c.Y.Max *= 1.4
	}
	c.Legend.Left = true
	c.Legend.TextStyle.Font.Size = vg.Points(8)
	p.save(c, file, title, 7*vg.Inch, 4.2*vg.Inch)
}

// chartFraction draws time against the fraction updated.
func (p *page) chartFraction() {
	rows := p.rows.Select(func(r result.Row) bool { return r.Experiment == "fraction" })
	for _, kind := range []string{"random", "sequential"} {
		p.lines(rows, kind+" updates", "fraction updated, %", "fraction-"+kind+".svg", func(what string) (float64, bool) {
			s, ok := strings.CutPrefix(what, kind+" ")
			v, err := strconv.ParseFloat(strings.TrimSuffix(s, " %"), 64)
			return v, ok && err == nil
		})
	}
}

func (p *page) chartTrace() {
	rows := p.rows.Select(func(r result.Row) bool { return r.Experiment == "trace" })
	p.lines(rows, "hourly synchronisation over a trace", "hour", "trace.svg", func(what string) (float64, bool) {
		s, ok := strings.CutPrefix(what, "hour ")
		v, err := strconv.ParseFloat(s, 64)
		return v, ok && err == nil
	})
}

// lines draws the tools' median seconds over what x makes of a case.
func (p *page) lines(rows result.Set, title, axis, file string, x func(string) (float64, bool)) {
	c := newChart(title, axis, "seconds (logarithmic)")
	logarithmic(c)
	drawn := false
	for i, tool := range result.Distinct(rows, func(r result.Row) string { return r.Tool }) {
		var pts plotter.XYs
		for _, what := range result.Distinct(rows, func(r result.Row) string { return r.Case }) {
			s := of(rows, rows[0].Experiment, what, tool).Of(result.Seconds)
			if v, ok := x(what); ok && s.N > 0 {
				pts = append(pts, plotter.XY{X: v, Y: max(s.Median, 0.01)})
			}
		}
		if len(pts) < 2 {
			continue
		}
		l, s, err := plotter.NewLinePoints(pts)
		if err != nil {
			p.err = err
			return
		}
		l.Color, s.Color, s.Shape = plotutil.Color(i), plotutil.Color(i), plotutil.Shape(i)
		c.Add(l, s)
		c.Legend.Add(tool, l, s)
		drawn = true
	}
	if !drawn {
		return
	}
	c.Y.Min, c.Y.Max = min(c.Y.Min, 0.1), c.Y.Max*4
	p.save(c, file, title, 7*vg.Inch, 4*vg.Inch)
}
