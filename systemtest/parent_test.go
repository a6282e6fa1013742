// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// lists is an image of which lists of changed ranges are made by hand.
type lists struct {
	*env
	c   *content
	f   *os.File
	img string
	at  time.Time
}

func newListed(t *testing.T) *lists {
	t.Helper()
	l := &lists{env: lightEnv(t), c: newContent(random(t), true), at: time.Now().Add(-24 * time.Hour)}
	l.img = image(t, l.c, 4<<20)
	l.f = direct(t, l.img)
	l.backup(l.when(), l.img)
	return l
}

// when is the next hour.
func (l *lists) when() string {
	l.at = l.at.Add(time.Hour)
	return "--time=" + l.at.Format(time.DateTime)
}

// change writes a block and lists it.
func (l *lists) change(block int64) (list string) {
	l.t.Helper()
	fillRange(l.t, l.f, l.c, block*kernel.BlockSize, kernel.BlockSize)
	return writeFile(l.t, fmt.Sprintf(`{"offset":%d,"length":%d}`+"\n", block*kernel.BlockSize, kernel.BlockSize))
}

// A list of ranges says what changed since one certain snapshot: where it may not be the newest
// there is, none is made, since what was written in between would be missed without a word.
func TestAListOfRangesNeedsACertainParent(t *testing.T) {
	t.Parallel()
	t.Run("Future", func(t *testing.T) {
		l := newListed(t)
		first := l.change(10)
		ahead := l.backup("--time=2090-01-01 00:00:00", "--changes", first, l.img).SnapshotID.String()
		list := l.change(20)
		l.fails(1, `it is not certain which snapshot of .* is the last, since [0-9a-f]{8} is of 2090-.*--parent`, "backup", l.when(), "--changes", list, l.img)
		s := l.backup(l.when(), "--changes", list, "--parent", ahead[:8], l.img)
		l.must("verify", s.SnapshotID.String(), l.img)
	})
	t.Run("SameTime", func(t *testing.T) {
		l := newListed(t)
		first, when := l.change(10), l.when()
		l.backup(when, "--changes", first, l.img)
		second := l.change(20)
		l.fails(1, `it is not certain which`, "backup", when, "--changes", second, l.img)
		l.backup(when, "--changes", "compare", l.img) // that may be
		l.fails(1, `are of the same time`, "backup", l.when(), "--changes", l.change(30), l.img)
		s := l.backup(l.when(), "--changes", "compare", l.img)
		l.must("verify", s.SnapshotID.String(), l.img)
	})
	t.Run("Damaged", func(t *testing.T) {
		l := newListed(t)
		newest := l.backup(l.when(), "--changes", l.change(10), l.img).SnapshotID.String()
		file := filepath.Join(l.repo, "snapshots", newest)
		b := readAll(t, file)
		b[len(b)/2] ^= 1
		rewrite(t, file, b)
		list := l.change(20)
		args := []string{"backup", l.when(), "--changes", list, l.img}
		r := l.try(append([]string{"--no-cache"}, args...)...)
		if r.code != 1 || !strings.Contains(r.stderr, "since one cannot be read") || !strings.Contains(r.stderr, newest[:8]) {
			t.Fatalf("beside a damaged snapshot: %+v", r)
		}
		if n := len(l.files("snapshots")); n != 2 {
			t.Fatalf("there are %d snapshots", n)
		}
		s := summary(t, l.must("--no-cache", "backup", "--json", l.when(), "--changes", "compare", l.img))
		l.must("--no-cache", "verify", s.SnapshotID.String(), l.img)
	})
	t.Run("Forgotten", func(t *testing.T) {
		l := newListed(t)
		newest := l.backup(l.when(), "--changes", l.change(10), l.img).SnapshotID.String()
		l.must("forget", newest)
		l.fails(1, `--parent .*: there is no such snapshot`, "backup", l.when(), "--changes", l.change(20), "--parent", newest, l.img)
	})
	t.Run("Named", func(t *testing.T) {
		l := newListed(t)
		first := l.snapshotIDs()[0]
		l.backup(l.when(), "--changes", l.change(10), l.img)
		l.fails(1, `--parent is for`, "backup", "--parent", first, "--changes", "full", l.img)
		// A list against the first one has both blocks.
		both := append(readAll(t, l.change(20)), readAll(t, l.change(10))...)
		s := l.backup(l.when(), "--changes", writeFile(t, string(both)), "--parent", first, l.img)
		if s.Parent.String() != first {
			t.Errorf("the parent is %v", s.Parent)
		}
		l.must("verify", s.SnapshotID.String(), l.img)
		s = l.backup(l.when(), "--changes", "compare", "--parent", first, l.img)
		if s.Parent.String() != first || s.Changes != "compare" {
			t.Errorf("compared: %+v", s)
		}
		l.must("verify", s.SnapshotID.String(), l.img)
	})
}

// A reader of the output that goes away ends the command, and its lock with it.
func TestAReaderThatGoesAwayLeavesNoLock(t *testing.T) {
	t.Parallel()
	l := newListed(t)
	for _, args := range [][]string{{"dump", "latest"}, {"--json", "check", "--read-data"}, {"--json", "snapshots"}} {
		cmd := l.command(args...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var errs strings.Builder
		cmd.Stderr = &errs
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if args[0] == "dump" {
			if _, err := out.Read(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
		}
		_ = out.Close()
		err = cmd.Wait()
		if exit := (*exec.ExitError)(nil); err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
			t.Fatalf("%q: %v", args, err)
		}
		if args[0] == "dump" && (err == nil || !strings.Contains(errs.String(), "after ") || !strings.Contains(errs.String(), "broken pipe")) {
			t.Errorf("dump says %q (%v)", errs.String(), err)
		}
		if locks := l.files("locks"); len(locks) != 0 {
			t.Errorf("%q leaves %d locks: %v, %q", args, len(locks), err, errs.String())
		}
	}
}

// A full backup stands by itself: what the index lists and the store has no more is stored again,
// and the snapshots that had lost it have it, too.
func TestAFullBackupStoresAgainWhatIsLost(t *testing.T) {
	t.Parallel()
	for _, cut := range []bool{false, true} {
		l := newListed(t)
		first := l.snapshotIDs()[0]
		var largest string
		for _, p := range l.files("data") {
			if largest == "" || len(readAll(t, p)) > len(readAll(t, largest)) {
				largest = p
			}
		}
		whole := readAll(t, largest)
		if err := os.Remove(largest); err != nil {
			t.Fatal(err)
		}
		if cut {
			rewrite(t, largest, whole[:len(whole)/2])
		}
		s := l.backup(l.when(), "--changes", "full", l.img)
		if s.DataAddedPacked == 0 || !cut && s.DataAddedPacked < int64(len(whole))*9/10 {
			t.Errorf("%d bytes were lost, %d are stored", len(whole), s.DataAddedPacked)
		}
		for _, id := range []string{first, s.SnapshotID.String()} {
			to := filepath.Join(t.TempDir(), "restored")
			l.must("-q", "restore", id, to)
			same(t, l.img, to)
		}
		l.must("repair", "index")
		l.must("prune")
		l.check()
	}
}

// Where the chain is damaged a backup says how to go on, and that helps.
func TestABackupOnADamagedChainSaysHowToGoOn(t *testing.T) {
	t.Parallel()
	l := newListed(t)
	packs := l.files("data")
	slices.SortFunc(packs, func(a, b string) int { return len(readAll(t, a)) - len(readAll(t, b)) })
	meta := packs[len(packs)-2] // sums are most of it
	b := readAll(t, meta)
	b[len(b)/2] ^= 1
	rewrite(t, meta, b)
	l.fails(1, "`backup --changes full` begins a new chain", "--no-cache", "backup", l.img, "--changes", "compare")
	l.must("-q", "--no-cache", "backup", l.img, "--changes", "full")
	l.must("--no-cache", "verify", "latest", l.img)
}
