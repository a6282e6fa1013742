// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Tests says which tests of a package run in a guest, and how.
type Tests struct {
	Run     string        // -test.run; "" runs all
	Args    []string      // further arguments of the test binary
	Env     []string      // SOAK is handed on by itself
	Timeout time.Duration // of all of them (10 minutes); ten times that with SOAK=1
	// Skips names the tests that may skip themselves, with the reason why that is right
	// on this kernel. Any other skip is a failure.
	Skips map[string]string
}

// GoTest runs the tests of a package of this project ("./kernel/bpf") in the guest,
// and shows each as a subtest. No test at all is a failure. If the guest dies of a fault that
// is the emulator's (see lostBreakPoint), it is booted again, and they run from the beginning.
func (m *Machine) GoTest(pkg string, o Tests) {
	m.t.Helper()
	t, ok := m.t.(*testing.T)
	if !ok {
		m.t.Fatal("tests have no place in a benchmark")
	}
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Minute
	}
	if soak() {
		o.Timeout *= 10
		o.Env = append(slices.Clone(o.Env), "SOAK=1")
	}
	var raw bytes.Buffer
	r := m.runTests(pkg, o, &raw)
	for tries := 1; r.Err != nil && tries < 3 && m.diedOfEmulation(); tries++ {
		m.t.Logf("run the tests of %s once more: kernel %s died of a break point that the emulation lost", pkg, m.kernel.Name)
		m.Boot()
		raw.Reset()
		r = m.runTests(pkg, o, &raw)
	}
	report, err := parseTests(&raw)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, top := range report.tests {
		top.replay(t, o.Skips)
	}
	switch {
	case len(report.tests) == 0:
		m.t.Errorf("%s ran no test in the guest: %v\n%s", pkg, r.Err, report.rest.String())
	case r.Err != nil && !m.t.Failed():
		m.t.Errorf("%s in the guest: %v\n%s", pkg, r.Err, report.rest.String())
	}
}

// runTests runs the tests of a package, and writes what their binary says to raw.
func (m *Machine) runTests(pkg string, o Tests, raw io.Writer) Result {
	m.t.Helper()
	binary, dir := m.putTests(pkg)
	args := []string{binary, "-test.v=test2json", "-test.timeout=" + o.Timeout.String()}
	if o.Run != "" {
		args = append(args, "-test.run="+o.Run)
	}
	return m.Start(Command{
		Args: append(args, o.Args...), Env: o.Env, Dir: dir,
		Output: io.MultiWriter(raw, &progress{t: m.t}), Timeout: o.Timeout + time.Minute,
	}).Wait()
}

// progress logs the end of each test while the others go on.
type progress struct {
	t    testing.TB
	line []byte
}

func (p *progress) Write(b []byte) (int, error) {
	p.line = append(p.line, b...)
	for {
		line, rest, ended := bytes.Cut(p.line, []byte("\n"))
		if !ended {
			return len(b), nil
		}
		p.line = rest
		// The binary marks its own lines with a control character.
		if line := strings.TrimLeft(string(line), "\x16 "); strings.HasPrefix(line, "--- ") {
			p.t.Log(line)
		}
	}
}

// putTests builds the tests of a package and puts them into the guest, once a boot.
func (m *Machine) putTests(pkg string) (binary, dir string) {
	m.t.Helper()
	root, err := Root()
	if err != nil {
		m.t.Fatal(err)
	}
	clean := filepath.Clean(pkg)
	dir = "/src/" + clean
	binary = dir + "/" + filepath.Base(clean) + ".test"
	if m.tests[pkg] {
		return binary, dir
	}
	local := m.file(strings.ReplaceAll(clean, "/", "-") + ".test")
	if err := goBuild(local, "test", "./"+clean, "-c"); err != nil {
		m.t.Fatal(err)
	}
	m.Put(local, binary)
	if _, err := os.Stat(filepath.Join(root, clean, "testdata")); err == nil {
		tar := exec.Command("tar", "-C", filepath.Join(root, clean), "-c", "testdata")
		out, err := tar.Output()
		if err != nil {
			m.t.Fatalf("pack testdata of %s: %v", pkg, err)
		}
		if r := m.Start(Command{Args: []string{"tar", "-x"}, Dir: dir, Stdin: bytes.NewReader(out)}).Wait(); r.Err != nil {
			m.t.Fatalf("unpack testdata of %s: %v: %s", pkg, r.Err, r.Stderr)
		}
	}
	m.tests[pkg] = true
	return binary, dir
}

// testReport is what a test binary said.
type testReport struct {
	tests []*guestTest  // of the top level, in the order in which they began
	rest  *bytes.Buffer // output of no test
}

type guestTest struct {
	name   string // without its parents'
	full   string
	action string // "pass", "fail", "skip"; "" if it never ended
	took   float64
	output strings.Builder
	subs   []*guestTest
}

// parseTests understands the output of a test binary with -test.v=test2json.
func parseTests(raw io.Reader) (testReport, error) {
	report := testReport{rest: &bytes.Buffer{}}
	convert := exec.Command("go", "tool", "test2json")
	convert.Stdin = raw
	out, err := convert.Output()
	if err != nil {
		return report, fmt.Errorf("go tool test2json: %w", err)
	}
	all := map[string]*guestTest{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var e struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return report, nil
		} else if err != nil {
			return report, fmt.Errorf("go tool test2json: %w", err)
		}
		if e.Test == "" {
			report.rest.WriteString(e.Output)
			continue
		}
		g := all[e.Test]
		if g == nil {
			g = &guestTest{name: e.Test, full: e.Test}
			all[e.Test] = g
			if i := strings.LastIndexByte(e.Test, '/'); i >= 0 && all[e.Test[:i]] != nil {
				g.name = e.Test[i+1:]
				above := all[e.Test[:i]]
				above.subs = append(above.subs, g)
			} else {
				report.tests = append(report.tests, g)
			}
		}
		switch e.Action {
		case "output":
			if !strings.HasPrefix(e.Output, "=== ") {
				g.output.WriteString(e.Output)
			}
		case "pass", "fail", "skip":
			g.action, g.took = e.Action, e.Elapsed
		}
	}
}

// replay shows a test of the guest as a subtest of t.
func (g *guestTest) replay(t *testing.T, skips map[string]string) {
	t.Run(g.name, func(t *testing.T) {
		for _, sub := range g.subs {
			sub.replay(t, skips)
		}
		t.Logf("%.1f s in the guest\n%s", g.took, g.output.String())
		switch reason, known := skips[g.full]; {
		case g.action == "skip" && known:
			t.Skip("known: " + reason)
		case g.action == "skip":
			t.Error("skipped in the guest, where it must run")
		case g.action == "":
			t.Error("began in the guest, and did not end")
		case g.action == "fail":
			t.Fail()
		}
	})
}
