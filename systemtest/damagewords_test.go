// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// twoBackups makes a repository of two snapshots of an image, and gives the files of a kind that
// the second one added.
func twoBackups(t *testing.T, kind string) (e *env, img string, ids, added []string) {
	t.Helper()
	e = lightEnv(t)
	c := newContent(random(t), false)
	img = image(t, c, 1<<20)
	first := e.backup(img)
	before := e.files(kind)
	f := direct(t, img)
	fillRange(t, f, c, 0, 64<<10)
	second := e.backup(img)
	for _, file := range e.files(kind) {
		if !slices.Contains(before, file) {
			added = append(added, file)
		}
	}
	if len(added) == 0 {
		t.Fatal("nothing was added")
	}
	return e, img, []string{first.SnapshotID.String(), second.SnapshotID.String()}, added
}

// flip changes a bit in the middle of a file of the repository.
func flip(t *testing.T, file string) {
	t.Helper()
	b := readAll(t, file)
	b[len(b)/2] ^= 1
	rewrite(t, file, b)
}

// TestListsGoOnWithoutADamagedIndex: what is listed does not depend on it, or not all of it.
func TestListsGoOnWithoutADamagedIndex(t *testing.T) {
	t.Parallel()
	e, _, ids, added := twoBackups(t, "index")
	flip(t, added[0])
	says := func(r result) {
		t.Helper()
		if n := strings.Count(r.stderr, "warning: going on without an index file"); n != 1 || !strings.Contains(r.stderr, filepath.Base(added[0])[:8]) {
			t.Errorf("it warns %d times: %s", n, r.stderr)
		}
	}
	for _, args := range [][]string{{"snapshots"}, {"snapshots", "--json"}} {
		r := e.try(append([]string{"--no-cache"}, args...)...)
		if r.code != 0 || !strings.Contains(r.stdout, ids[0][:8]) || !strings.Contains(r.stdout, ids[1][:8]) {
			t.Errorf("%q: %+v", args, r)
		}
		if args[len(args)-1] != "--json" {
			says(r)
			if !strings.Contains(r.stdout, "1.0 MiB") {
				t.Errorf("the size of what is not damaged is missing: %s", r.stdout)
			}
		}
	}
	r := e.try("--no-cache", "ls", ids[0])
	if says(r); r.code != 0 || !strings.Contains(r.stdout, "snapshot "+ids[0][:8]) {
		t.Errorf("%+v", r)
	}
	r = e.try("--no-cache", "ls", ids[1])
	if says(r); r.code != 1 {
		t.Errorf("%+v", r)
	}
}

// TestASnapshotThatCannotBeReadIsCounted by check, and forget has no time to print for it.
func TestASnapshotThatCannotBeReadIsCounted(t *testing.T) {
	t.Parallel()
	e, _, ids, added := twoBackups(t, "snapshots")
	flip(t, added[0])
	c := e.checked()
	if c.summary.Snapshots != 2 || !slices.Equal(c.summary.DamagedSnapshots, ids[1:]) || len(c.errors) != 1 {
		t.Errorf("%+v", c)
	}
	if r := e.try("-q", "check"); r.code != 1 || !strings.Contains(r.stdout, "1 errors; 1 of 2 snapshots are damaged;") {
		t.Errorf("%+v", r)
	}
	out := e.must("--no-cache", "forget", ids[1])
	if !strings.Contains(out, ids[1][:8]+"  it cannot be read") || strings.Contains(out, "0001") {
		t.Errorf("forget says %q", out)
	}
	if c := e.checked(); c.code != 0 || c.summary.Snapshots != 1 {
		t.Errorf("%+v", c)
	}
}

// TestARefusalForDamageSaysWhatToDo, of restore, dump and check. What was not refused has given
// all that there is.
func TestARefusalForDamageSaysWhatToDo(t *testing.T) {
	t.Parallel()
	const hint = "with --salvage you get what there is"
	for _, c := range []struct {
		what          string
		restore, dump bool // are refused
		next          string
	}{
		{"a pack is gone", true, true, "next: `restore --salvage` what"},
		{"a pack has a bad bit", false, true, "next: `restore --salvage` what"},
		{"an index file is bad", true, true, "next: `repair index` (not `prune`), `check` again;"},
	} {
		e, _, ids, added := twoBackups(t, "index")
		pack := e.largestPack()
		switch c.what {
		case "a pack is gone":
			if err := os.Remove(pack); err != nil {
				t.Fatal(err)
			}
		case "a pack has a bad bit":
			flip(t, pack)
		default:
			flip(t, added[0])
		}
		to := filepath.Join(t.TempDir(), "restored")
		for _, salvage := range []string{"--salvage=false", "--salvage"} {
			r := e.try("-q", "--no-cache", "restore", "--force", salvage, ids[1], to)
			if said := strings.Contains(r.stderr, hint); r.code != 1 || said != (c.restore && salvage != "--salvage") {
				t.Errorf("%s: restore %s: %+v", c.what, salvage, r)
			}
			r = e.try("-q", "--no-cache", "dump", salvage, ids[1])
			if said := strings.Contains(r.stderr, hint); r.code != 1 || said != (c.dump && salvage != "--salvage") {
				t.Errorf("%s: dump %s: exit code %d, %s", c.what, salvage, r.code, r.stderr)
			}
		}
		r := e.try("-q", "check", "--read-data")
		if lines := strings.Split(strings.TrimSpace(r.stdout), "\n"); r.code != 1 || !strings.HasPrefix(lines[len(lines)-1], c.next) {
			t.Errorf("%s: %+v", c.what, r)
		}
	}
}

// TestAMissingPasswordIsNotAWrongOne: nothing was tried.
func TestAMissingPasswordIsNotAWrongOne(t *testing.T) {
	t.Parallel()
	e := lightEnv(t)
	e.vars = append(e.vars, "RESTIC_PASSWORD=")
	e.fails(12, "^no password is given: use .RESTIC_PASSWORD, --password-file or", "snapshots")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	e.fails(12, "^the password that is given is empty$", "snapshots", "--password-file", empty)
	e.vars = append(e.vars, "RESTIC_PASSWORD=other")
	e.fails(12, "wrong password", "snapshots")
}
