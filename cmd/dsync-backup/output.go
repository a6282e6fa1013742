// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

func (g *globals) printJSON(w io.Writer, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		fmt.Fprintln(g.stderr, "dsync-backup: encode JSON:", err)
		return
	}
	_, _ = w.Write(append(b, '\n'))
}

// size writes bytes for people.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	v, i := float64(n), 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, units[i])
}

// progress shows how far a long command is: a bar on a terminal, a plain line
// now and then elsewhere, JSON with --json, nothing with -q. It may be held
// while a file system is frozen, since whoever reads our output may then hang.
type progress struct {
	g     *globals
	verb  string
	tty   bool
	every time.Duration

	mu    sync.Mutex
	start time.Time
	last  time.Time
	held  bool
	drawn bool
}

func (g *globals) progress(verb string) *progress {
	p := &progress{g: g, verb: verb, start: time.Now(), last: time.Now(), every: 10 * time.Second}
	if term.IsTerminal(int(os.Stderr.Fd())) && !g.json {
		p.tty, p.every = true, 200*time.Millisecond
	}
	if g.json {
		p.every = time.Second
	}
	return p
}

// hold stops all output until it is called with false.
func (p *progress) hold(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = on
}

// update tells how many bytes are done.
func (p *progress) update(phase string, done, total int64) {
	p.show(phase, done, total, "bytes_done", "total_bytes", size)
}

// count tells how many things are done; the total may be 0 if it is not known.
func (p *progress) count(phase string, done, total int64) {
	p.show(phase, done, total, "done", "total", func(n int64) string { return strconv.FormatInt(n, 10) })
}

func (p *progress) show(phase string, done, total int64, doneKey, totalKey string, number func(int64) string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.g.quiet || p.held || now.Sub(p.last) < p.every {
		return
	}
	p.last = now
	elapsed := now.Sub(p.start)
	rate := float64(done) / elapsed.Seconds()
	var eta time.Duration
	if rate > 0 && total > done {
		eta = time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second)
	}
	if p.g.json {
		percent := 1.0
		if total > 0 {
			percent = float64(done) / float64(total)
		}
		p.g.printJSON(p.g.stdout, map[string]any{
			"message_type": "status", "phase": phase, "percent_done": percent, doneKey: done, totalKey: total,
			"seconds_elapsed": int(elapsed.Seconds()), "seconds_remaining": int(eta.Seconds()),
		})
		return
	}
	percent := 100.0
	if total > 0 {
		percent = float64(done) / float64(total) * 100
	}
	line := fmt.Sprintf("%s: %s  %5.1f %%  %s of %s  %s/s  ETA %s", p.verb, phase, percent, number(done), number(total), number(int64(rate)), eta)
	if total <= 0 {
		line = fmt.Sprintf("%s: %s  %s", p.verb, phase, number(done))
	}
	if !p.tty {
		fmt.Fprintln(p.g.stderr, line)
		return
	}
	const width = 24
	n := int(percent / 100 * width)
	bar := strings.Repeat("#", min(n, width)) + strings.Repeat(".", max(width-n, 0))
	fmt.Fprintf(p.g.stderr, "\r\033[K[%s] %s", bar, line)
	p.drawn = true
}

// end clears the bar.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drawn {
		fmt.Fprint(p.g.stderr, "\r\033[K")
		p.drawn = false
	}
}
