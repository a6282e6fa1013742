// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// checked is what `check --json` says.
type checked struct {
	code     int
	errors   []string // what is damaged
	hints    []string
	damaged  map[string][]kernel.Extent // by snapshot
	messages map[string]string
	summary  struct {
		NumErrors          int      `json:"num_errors"`
		BrokenPacks        []string `json:"broken_packs"`
		SuggestRepairIndex bool     `json:"suggest_repair_index"`
		SuggestPrune       bool     `json:"suggest_prune"`
		DamagedSnapshots   []string `json:"damaged_snapshots"`
		Snapshots, Devices int
	}
}

func (e *env) checked(args ...string) checked {
	e.t.Helper()
	r := e.try(append([]string{"-q", "--json", "check"}, args...)...)
	c := checked{code: r.code, damaged: map[string][]kernel.Extent{}, messages: map[string]string{}}
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	for i, line := range lines {
		var o struct {
			MessageType string          `json:"message_type"`
			Kind        string          `json:"kind"`
			ID          string          `json:"id"`
			Message     string          `json:"message"`
			Snapshot    string          `json:"snapshot_id"`
			Ranges      []kernel.Extent `json:"ranges"`
		}
		if err := json.Unmarshal([]byte(line), &o); err != nil || strings.Contains(o.Message, "\n") {
			e.t.Fatalf("check: line %q: %v; %s", line, err, r.stderr)
		}
		switch o.MessageType {
		case "error":
			c.errors = append(c.errors, o.Kind+" "+o.ID+": "+o.Message)
		case "hint":
			c.hints = append(c.hints, o.Kind+" "+o.ID+": "+o.Message)
		case "damaged_snapshot":
			c.damaged[o.Snapshot], c.messages[o.Snapshot] = o.Ranges, o.Message
		case "summary":
			if err := json.Unmarshal([]byte(line), &c.summary); err != nil || i != len(lines)-1 {
				e.t.Fatalf("summary %q: %v", line, err)
			}
		default:
			e.t.Fatalf("check: line %q", line)
		}
	}
	if (c.code == 0) != (c.summary.NumErrors == 0) || c.summary.NumErrors != len(c.errors)+len(c.damaged) || c.code > 1 {
		e.t.Fatalf("exit code %d with %+v: %s%s", c.code, c.summary, r.stdout, r.stderr)
	}
	return c
}

// lostBlocks are the blocks in which got does not hold what truth does.
func lostBlocks(t testing.TB, truth, got string) (out []kernel.Extent) {
	t.Helper()
	a, b := readAll(t, truth), readAll(t, got)
	if len(a) != len(b) {
		t.Fatalf("%d bytes instead of %d", len(b), len(a))
	}
	for off := 0; off < len(a); off += kernel.BlockSize {
		end := min(off+kernel.BlockSize, len(a))
		if string(a[off:end]) != string(b[off:end]) {
			out = append(out, kernel.Extent{Offset: int64(off), Length: int64(end - off)})
		}
	}
	return kernel.Align(out, int64(len(a)))
}

func inside(small, large []kernel.Extent) bool {
	for _, s := range small {
		if !slices.ContainsFunc(large, func(l kernel.Extent) bool { return l.Offset <= s.Offset && s.End() <= l.End() }) {
			return false
		}
	}
	return true
}

// TestDamageAnywhereIsNamedAndTheRestIsThere harms one file after another of a
// repository of devices and files at a random place, in one of several ways.
// Whatever is damaged must be named with the snapshots and ranges that it
// touches, and all others must restore; of a damaged device all that is not
// named must be right.
func TestDamageAnywhereIsNamedAndTheRestIsThere(t *testing.T) {
	t.Parallel()
	r := random(t)
	m := newMixed(lightEnv(t), r)
	for range 3 {
		m.back()
	}
	if c := m.checked("--read-data"); c.code != 0 || len(c.hints) != 0 || c.summary.Snapshots != 6 || c.summary.Devices != 3 {
		t.Fatalf("an undamaged repository: %+v", c)
	}
	ways := []string{"flip", "cut", "remove"}
	touched, harmless, salvaged := 0, 0, 0
	for i := range count(100, 12) {
		kind := []string{"data", "data", "data", "index"}[r.IntN(4)]
		files := m.env.files(kind)
		slices.Sort(files)
		file, way := files[r.IntN(len(files))], ways[i%len(ways)]
		if i%4 == 0 {
			kind, file = "data", m.largestPack() // a device's data, so that there is something to be salvaged
		}
		good := readAll(t, file)
		bad := slices.Clone(good)
		at := r.IntN(len(bad))
		switch way {
		case "flip":
			bad[at] ^= 1 << r.IntN(8)
		case "cut":
			bad = bad[:at]
		}
		if way == "remove" {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		} else {
			rewrite(t, file, bad)
		}
		what := way + " " + kind + " " + filepath.Base(file)[:8]
		c := m.checked("--read-data")
		if c.code == 0 {
			t.Fatalf("%s at %d of %d: check finds nothing", what, at, len(good))
		}
		if !slices.ContainsFunc(c.errors, func(s string) bool { return strings.Contains(s, filepath.Base(file)[:8]) }) && (kind != "index" || way != "remove") {
			t.Fatalf("%s: not named: %q", what, c.errors)
		}
		if restic := finish(t, m.prepare(restics["0.18"], "check", "--read-data", "--no-cache")); restic.code == 0 {
			t.Fatalf("%s: restic finds nothing", what)
		}
		if way != "flip" { // that shows without reading
			if less := m.checked(); less.code != 1 || !maps.EqualFunc(less.damaged, c.damaged, slices.Equal) {
				t.Fatalf("%s: without reading data check names %v, with it %v", what, less.damaged, c.damaged)
			}
		}
		if len(c.damaged) == 0 {
			harmless++
		}
		m.salvage(what, c, &touched, &salvaged)
		for id, saved := range m.folders {
			to := t.TempDir()
			res := finish(t, m.prepare(restics["0.18"], "restore", "--no-cache", id, "--target", to))
			if _, named := c.damaged[id]; named || kind == "index" {
				continue // restic reads nothing without the whole index
			}
			if res.code != 0 {
				t.Fatalf("%s: restic cannot restore snapshot %s, which is not named: %s", what, id[:8], res.stderr)
			}
			run(t, "diff", "-r", saved, filepath.Join(to, m.files))
		}
		rewrite(t, file, good)
	}
	m.clean()
	t.Logf("%d damaged devices, of which %d gave all that was not named; %d damages touched no snapshot", touched, salvaged, harmless)
	if salvaged < 3 {
		t.Error("too few devices could be salvaged")
	}
}

// salvage restores every device after a damage.
func (m *mixed) salvage(what string, c checked, touched, salvaged *int) {
	m.t.Helper()
	for id, truth := range m.devices {
		lost, named := c.damaged[id]
		to := filepath.Join(m.t.TempDir(), "restored")
		res := m.try("--no-cache", "-q", "--json", "restore", "--salvage", id, to)
		if !named {
			if res.code != 0 {
				m.t.Fatalf("%s: snapshot %s is not named, and: %s", what, id[:8], res.stderr)
			}
			same(m.t, truth, to)
			continue
		}
		*touched++
		if _, err := os.Stat(to); err != nil {
			size := int64(len(readAll(m.t, truth)))
			if n := kernel.TotalLength(lost); res.code != 1 || n > 0 && n < size { // only where nothing is left
				m.t.Fatalf("%s: snapshot %s is refused, and %d of %d bytes are lost: %+v", what, id[:8], n, size, res)
			}
			continue
		}
		wrong := lostBlocks(m.t, truth, to)
		if !inside(wrong, lost) {
			m.t.Fatalf("%s: check names %v of snapshot %s, wrong are %v: %s", what, lost, id[:8], wrong, res.stdout)
		}
		if (res.code == 0) != (len(wrong) == 0) && len(lost) > 0 {
			m.t.Fatalf("%s: exit code %d, wrong are %v", what, res.code, wrong)
		}
		// Both say the same, since both know which layer gives each block.
		if told := lostRanges(m.t, res.stdout); !slices.Equal(told, lost) {
			m.t.Fatalf("%s: check names %v of snapshot %s, restore %v", what, lost, id[:8], told)
		}
		*salvaged++
		// A dump has zeros where nothing is known, and is right elsewhere.
		dump := filepath.Join(m.t.TempDir(), "dump")
		cmd := m.command("--no-cache", "-q", "dump", "--salvage", id)
		f, err := os.Create(dump)
		if err != nil {
			m.t.Fatal(err)
		}
		cmd.Stdout = f
		_ = cmd.Run() // exit code 1 where something is lost
		if err := f.Close(); err != nil {
			m.t.Fatal(err)
		}
		if wrong := lostBlocks(m.t, truth, dump); !inside(wrong, lost) {
			m.t.Fatalf("%s: a dump of snapshot %s is wrong at %v, lost are %v", what, id[:8], wrong, lost)
		}
	}
}

// lostRanges are those that restore prints.
func lostRanges(t testing.TB, out string) []kernel.Extent {
	t.Helper()
	list := []kernel.Extent{}
	for line := range strings.Lines(out) {
		var o struct {
			MessageType string `json:"message_type"`
			kernel.Extent
		}
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		if o.MessageType == "lost" {
			list = append(list, o.Extent)
		}
	}
	return list
}

func TestRepairIndexMendsWhatThePacksHold(t *testing.T) {
	r := random(t)
	m := newMixed(lightEnv(t), r)
	m.back()
	m.back()
	for i := range 6 {
		for j, index := range m.env.files("index") {
			harm := (i + j) % 3
			if j == 0 {
				harm = i % 2 // one at least
			}
			switch harm {
			case 0:
				if err := os.Remove(index); err != nil {
					t.Fatal(err)
				}
			case 1:
				b := readAll(t, index)
				b[r.IntN(len(b))] ^= 1
				rewrite(t, index, b)
			}
		}
		if c := m.checked(); c.code != 1 || !c.summary.SuggestRepairIndex {
			t.Fatalf("check of a repository with a broken index: %+v", c)
		}
		args := []string{"repair", "index"}
		if i%2 == 1 {
			args = append(args, "--read-all-packs")
		}
		m.must(args...)
		m.clean()
		m.gives(false)
	}
}

func TestCheckReadsTheSubsetThatIsAskedFor(t *testing.T) {
	m := newMixed(lightEnv(t), random(t))
	for range 3 {
		m.back()
	}
	pack := m.largestPack()
	b := readAll(t, pack)
	b[len(b)/2] ^= 1
	rewrite(t, pack, b)
	found := 0
	for _, n := range []string{"1/3", "2/3", "3/3"} {
		c := m.checked("--read-data-subset", n)
		if c.code == 1 {
			found++
		}
		restic := finish(t, m.prepare(restics["0.18"], "check", "--read-data-subset", n))
		if restic.code != c.code {
			t.Errorf("part %s: exit code %d, restic's is %d", n, c.code, restic.code)
		}
	}
	if found != 1 {
		t.Errorf("one pack is damaged, and %d of three parts find it", found)
	}
	if c := m.checked("--read-data-subset", "100%"); c.code != 1 || !slices.Contains(c.summary.BrokenPacks, filepath.Base(pack)) {
		t.Errorf("100%%: %+v", c)
	}
	m.must("check")
	// One pack, and which one is up to chance.
	if res := m.try("check", "--read-data-subset", "1B", "--no-lock", "--with-cache", "-q"); res.code > 1 || res.stderr != "" {
		t.Errorf("%+v", res)
	}
	for _, bad := range []string{"0/3", "4/3", "1/257", "0%", "101%", "x", "0"} {
		m.fails(1, "subset", "check", "--read-data-subset", bad)
	}
	m.fails(1, "exclude", "check", "--read-data-subset", "1/2", "--read-data")
}
