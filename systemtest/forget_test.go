// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

// opened is the repository as a library has it, to put things into it.
func (e *env) opened() *repo.Repository {
	e.t.Helper()
	be, err := local.Open(e.repo, local.Options{})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { be.Close() })
	r, err := repo.Open(e.t.Context(), be, "geheim", repo.Options{})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { r.Close() })
	if err := r.LoadIndex(e.t.Context()); err != nil {
		e.t.Fatal(err)
	}
	return r
}

// randomSnapshots saves n snapshots of an empty folder: at random times over
// years, in several time zones, some in the same second and some at the very
// same instant, of few hosts, paths and tags.
func (e *env) randomSnapshots(r *rand.Rand, n int) {
	e.t.Helper()
	to := e.opened()
	w := to.NewWriter(e.t.Context(), repo.WriterOptions{})
	tree, err := w.SaveTree(e.t.Context(), &repo.Tree{})
	if err == nil {
		err = w.Flush(e.t.Context())
	}
	if err != nil {
		e.t.Fatal(err)
	}
	zones := []*time.Location{time.UTC, time.Local, time.FixedZone("", 5*3600+1800), time.FixedZone("", -11*3600), time.FixedZone("", 14*3600)}
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	spans := []time.Duration{time.Hour, 48 * time.Hour, 60 * 24 * time.Hour, 900 * 24 * time.Hour, 4000 * 24 * time.Hour}
	var last *repo.Snapshot
	for i := range n {
		s := &repo.Snapshot{
			Time: time.Now().Add(-time.Duration(r.Int64N(int64(spans[r.IntN(len(spans))])))).In(zones[r.IntN(len(zones))]),
			Tree: &tree.ID, Hostname: pick("one", "two", ""),
			Paths:    [][]string{{"/dev/vdb"}, {"/dev/vdc"}, {"/home", "/etc"}, {"/etc", "/home"}}[r.IntN(4)],
			Username: strconv.Itoa(i),
		}
		for range r.IntN(3) {
			if t := pick("dsync", "a", "b", "c d"); !slices.Contains(s.Tags, t) {
				s.Tags = append(s.Tags, t)
			}
		}
		switch {
		case last != nil && r.IntN(8) == 0: // in the same second
			s.Time = last.Time.Truncate(time.Second).Add(time.Duration(r.Int64N(1e9)))
		case last != nil && r.IntN(12) == 0:
			// At the same instant: which of the two stays restic leaves open, so
			// that nothing else may tell them apart.
			user := s.Username
			copied := *last
			s = &copied
			s.Username = user
		case r.IntN(5) == 0: // weeks that lie in two years
			s.Time = time.Date(2020+4*r.IntN(2), 12, 27+r.IntN(10), r.IntN(24), 0, 0, r.IntN(1e9), zones[r.IntN(len(zones))])
		case r.IntN(40) == 0: // a clock that was wrong
			s.Time = time.Now().Add(time.Duration(r.Int64N(int64(1000 * time.Hour))))
		}
		if _, _, err := to.SaveSnapshot(e.t.Context(), s); err != nil {
			e.t.Fatal(err)
		}
		last = s
	}
}

// randomPolicy makes flags of forget.
func randomPolicy(r *rand.Rand) (args []string) {
	maybe := func(one int, fn func()) {
		if r.IntN(one) == 0 {
			fn()
		}
	}
	for _, k := range []string{"last", "hourly", "daily", "weekly", "monthly", "yearly"} {
		maybe(4, func() {
			n := strconv.Itoa(r.IntN(12))
			if r.IntN(8) == 0 {
				n = "unlimited"
			}
			args = append(args, "--keep-"+k, n)
		})
	}
	for _, k := range []string{"", "-hourly", "-daily", "-weekly", "-monthly", "-yearly"} {
		maybe(7, func() {
			d := ""
			for _, unit := range []string{"y", "m", "d", "h"} {
				if r.IntN(2) == 0 {
					d += strconv.Itoa(r.IntN(15)) + unit
				}
			}
			args = append(args, "--keep-within"+k, d+"1h")
		})
	}
	for range 2 {
		maybe(7, func() {
			args = append(args, "--keep-tag", []string{"a", "b", "a,b", "", "dsync, a", "none"}[r.IntN(6)])
		})
	}
	maybe(3, func() {
		args = append(args, "--group-by", []string{"", "host", "paths", "tags", "host,tags", "path,tag,hosts"}[r.IntN(6)])
	})
	maybe(6, func() { args = append(args, "--host", "one") })
	maybe(6, func() { args = append(args, "--path", "/home") })
	maybe(6, func() { args = append(args, "--tag", []string{"a", "dsync,b", "", "c d"}[r.IntN(4)]) })
	return args
}

// forgotten is the JSON of forget in a form that can be compared: the groups
// sorted, and snapshots at the very same instant not told apart.
func forgotten(t testing.TB, out string) []string {
	t.Helper()
	type sn struct {
		Time     time.Time `json:"time"`
		ID       string    `json:"id"`
		ShortID  string    `json:"short_id"`
		Hostname string    `json:"hostname"`
		Paths    []string  `json:"paths"`
		Tags     []string  `json:"tags"`
	}
	var groups []struct {
		Tags    []string `json:"tags"`
		Host    string   `json:"host"`
		Paths   []string `json:"paths"`
		Keep    []sn     `json:"keep"`
		Remove  []sn     `json:"remove"`
		Reasons []struct {
			Snapshot sn       `json:"snapshot"`
			Matches  []string `json:"matches"`
		} `json:"reasons"`
	}
	if strings.TrimSpace(out) == "" {
		return nil
	}
	dec := json.NewDecoder(strings.NewReader(out))
	dec.UseNumber()
	if err := dec.Decode(&groups); err != nil {
		t.Fatalf("forget --json: %v: %.300s", err, out)
	}
	var lines []string
	for _, g := range groups {
		twice := map[int64]int{}
		for _, s := range append(slices.Clone(g.Keep), g.Remove...) {
			twice[s.Time.UnixNano()]++
		}
		name := func(s sn) string {
			if len(s.ID) != 64 || s.ShortID != s.ID[:8] {
				t.Fatalf("no IDs in %+v", s)
			}
			id := s.ID
			if twice[s.Time.UnixNano()] > 1 {
				id = "one of several"
			}
			return fmt.Sprintf("%s %s %q %q %q", s.Time.Format(time.RFC3339Nano), id, s.Hostname, s.Paths, s.Tags)
		}
		head := fmt.Sprintf("%q %v %q %q %v", g.Tags, g.Tags == nil, g.Host, g.Paths, g.Paths == nil)
		for i, s := range g.Keep {
			lines = append(lines, fmt.Sprintf("%s keep %s", head, name(s)))
			lines = append(lines, fmt.Sprintf("%s because %s %q", head, name(g.Reasons[i].Snapshot), g.Reasons[i].Matches))
		}
		if len(g.Reasons) != len(g.Keep) {
			t.Fatalf("%d reasons for %d snapshots", len(g.Reasons), len(g.Keep))
		}
		for _, s := range g.Remove {
			lines = append(lines, fmt.Sprintf("%s remove %s", head, name(s)))
		}
	}
	sort.Strings(lines)
	return lines
}

// TestForgetDoesWhatResticDoes gives both programs the same snapshots and the
// same policies, and has them say what they would do and why.
func TestForgetDoesWhatResticDoes(t *testing.T) {
	t.Parallel()
	r := random(t)
	refused, applied := 0, 0
	for range count(6, 2) {
		e := lightEnv(t)
		e.randomSnapshots(r, 20+r.IntN(100))
		for range count(200, 60) {
			args := append([]string{"forget", "--dry-run", "--json", "--no-lock"}, randomPolicy(r)...)
			want := finish(t, e.prepare(restics["0.18"], args...))
			got := e.try(args...)
			if (want.code == 0) != (got.code == 0) {
				t.Fatalf("%q: restic ends with %d, %s\nours with %d, %s", args, want.code, want.stderr, got.code, got.stderr)
			}
			if want.code != 0 {
				refused++
				continue
			}
			applied++
			a, b := forgotten(t, want.stdout), forgotten(t, got.stdout)
			if !slices.Equal(a, b) {
				for _, l := range a {
					if !slices.Contains(b, l) {
						t.Errorf("only restic: %s", l)
					}
				}
				for _, l := range b {
					if !slices.Contains(a, l) {
						t.Errorf("only ours: %s", l)
					}
				}
				t.Fatalf("%q", args)
			}
		}
	}
	t.Logf("%d policies gave the same, %d were refused by both", applied, refused)
	if applied < 50 {
		t.Errorf("too few policies were applied")
	}
}

// TestForgetRemovesWhatItSays removes by policy and by name, and leaves the rest.
func TestForgetRemovesWhatItSays(t *testing.T) {
	r := random(t)
	e := lightEnv(t)
	e.randomSnapshots(r, 40)
	for i := range 4 {
		before := e.snapshotIDs()
		args := []string{"--keep-last", strconv.Itoa(5 - i), "--group-by", "host"}
		var groups []struct{ Keep, Remove []struct{ ID string } }
		if err := json.Unmarshal([]byte(e.must(append([]string{"forget", "--json"}, args...)...)), &groups); err != nil {
			t.Fatal(err)
		}
		var want, removed []string
		for _, g := range groups {
			for _, s := range g.Keep {
				want = append(want, s.ID)
			}
			for _, s := range g.Remove {
				removed = append(removed, s.ID)
			}
		}
		got := e.snapshotIDs()
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) || len(got)+len(removed) != len(before) || len(removed) == 0 {
			t.Fatalf("%q: %d snapshots before, %d kept, %d removed, %d left", args, len(before), len(want), len(removed), len(got))
		}
	}
	left := e.snapshotIDs()
	// Named: a prefix, one twice, one that is not there, which is passed over.
	e.must("forget", left[0][:10], left[0], "ffffffff")
	if got := e.snapshotIDs(); !slices.Equal(got, left[1:]) {
		t.Errorf("left %v, want %v", got, left[1:])
	}
	e.check()
	for _, c := range []struct {
		want string
		args []string
	}{
		{"no --keep rule", nil},
		{"no --keep rule", []string{"--host", "one"}},
		{"needs --host", []string{"--unsafe-allow-remove-all"}},
		{"keeps no snapshot of", []string{"--keep-tag", "nobody has it"}},
		{"negative", []string{"--keep-last", "-1"}},
		{"neither a number", []string{"--keep-daily", "7d"}},
		{"none of y, m, d, h", []string{"--keep-within", "3w"}},
		{"none of host", []string{"--keep-last", "1", "--group-by", "size"}},
		{"--no-lock", []string{"--keep-last", "1", "--no-lock"}},
		{"max-unused", []string{"--keep-last", "1", "--prune", "--max-unused", "101%"}},
	} {
		e.fails(1, c.want, append([]string{"forget"}, c.args...)...)
	}
	if got := e.snapshotIDs(); !slices.Equal(got, left[1:]) {
		t.Errorf("what was refused removed something: left %v", got)
	}
	e.must("forget", "--unsafe-allow-remove-all", "--host", "one", "--host", "two", "--host", "")
	if got := e.snapshotIDs(); len(got) != 0 {
		t.Errorf("left %v", got)
	}
}

// TestForgetTakesWhatResticTakes: -c, --hostname, and a filter beside IDs, of which it says that
// it is passed over, as restic does.
func TestForgetTakesWhatResticTakes(t *testing.T) {
	e := lightEnv(t)
	e.randomSnapshots(random(t), 20)
	ids := e.snapshotIDs()
	both := func(args ...string) (ours, theirs result) {
		t.Helper()
		args = append([]string{"forget", "--dry-run", "--no-lock"}, args...)
		return e.try(args...), finish(t, e.prepare(restics["0.18"], args...))
	}
	for _, args := range [][]string{{"--host", "one", ids[0]}, {"--tag", "a", ids[0], ids[1]}, {ids[0]}, {"--host", "one", "latest"}, {"--host", "one", "latest", ids[0]}} {
		ours, theirs := both(args...)
		if ours.code != 0 || theirs.code != 0 {
			t.Fatalf("%q: %+v, restic %+v", args, ours, theirs)
		}
		if got, want := strings.Contains(ours.stderr, "are ignored"), strings.Contains(theirs.stderr, "Ignoring \"filters\""); got != want {
			t.Errorf("%q: ours says %q, restic %q", args, ours.stderr, theirs.stderr)
		}
	}
	for _, args := range [][]string{{"--hostname", "one", "--keep-last", "1"}, {"--hostname", "one", "--hostname", "two", "--keep-last", "1"}, {"-c", "--keep-last", "2"}} {
		ours, theirs := both(append(args, "--json")...)
		if ours.code != 0 || theirs.code != 0 || !slices.Equal(forgotten(t, ours.stdout), forgotten(t, theirs.stdout)) {
			t.Errorf("%q: %+v, restic %+v", args, ours, theirs)
		}
	}
	long, short := e.must("forget", "-n", "--keep-last", "2"), e.must("forget", "-n", "--compact", "--keep-last", "2")
	for _, what := range []string{"keep ", "remove "} {
		if n, want := strings.Count(short, what), strings.Count(long, what); n != want || n == 0 {
			t.Errorf("--compact has %q %d times, want %d:\n%s", what, n, want, short)
		}
	}
	if strings.Contains(short, "last snapshot") || !strings.Contains(long, "last snapshot") {
		t.Errorf("--compact has the reasons:\n%s\n%s", short, long)
	}
}

// TestForgetSaysWhatIsRemovedWhenItIs: not before, when it may fail.
func TestForgetSaysWhatIsRemovedWhenItIs(t *testing.T) {
	e := lightEnv(t)
	e.randomSnapshots(random(t), 5)
	ids := e.snapshotIDs()
	// Root neither can delete it.
	run(t, "chattr", "+i", filepath.Join(e.repo, "snapshots", ids[0]))
	t.Cleanup(func() { run(t, "chattr", "-i", filepath.Join(e.repo, "snapshots", ids[0])) })
	for _, args := range [][]string{{"forget", ids[0]}, {"forget", "--json", ids[0]}} {
		if r := e.try(args...); r.code != 1 || strings.Contains(r.stdout, "snapshots removed") || strings.HasPrefix(r.stdout, "[") {
			t.Errorf("%q: exit code %d, %s%s", args, r.code, r.stdout, r.stderr)
		}
	}
	if out := e.must("forget", ids[1]); !strings.Contains(out, "1 snapshots removed") {
		t.Errorf("it says %q", out)
	}
}

// TestQuietCommandsSayNothing: -q leaves nothing to say but what goes wrong.
func TestQuietCommandsSayNothing(t *testing.T) {
	e := lightEnv(t)
	e.randomSnapshots(random(t), 3)
	for _, args := range [][]string{{"unlock"}, {"repair", "index"}, {"forget", "--keep-last", "1"}, {"prune"}} {
		if out := e.must(append([]string{"-q"}, args...)...); out != "" {
			t.Errorf("%q says %q", args, out)
		}
		if out := e.must(args...); out == "" {
			t.Errorf("%q says nothing without -q", args)
		}
	}
}

// TestForgetLatestBesideADamagedSnapshotRemovesNothing: which one is the latest is not known
// then. Named by its ID the damaged one goes, and no other.
func TestForgetLatestBesideADamagedSnapshotRemovesNothing(t *testing.T) {
	r := random(t)
	e := lightEnv(t)
	e.randomSnapshots(r, 15)
	before := e.snapshotIDs()
	slices.Sort(before)
	bad := before[len(before)-1]
	path := filepath.Join(e.repo, "snapshots", bad)
	if err := errors.Join(os.Chmod(path, 0o600), os.Truncate(path, 50)); err != nil {
		t.Fatal(err)
	}
	e.fails(1, bad[:8], "--no-cache", "forget", "latest")
	if n := len(e.files("snapshots")); n != len(before) {
		t.Fatalf("%d snapshots are left of %d", n, len(before))
	}
	e.must("--no-cache", "forget", bad)
	got := e.snapshotIDs()
	slices.Sort(got)
	if !slices.Equal(got, before[:len(before)-1]) {
		t.Errorf("left %v, want %v", got, before[:len(before)-1])
	}
}
