// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// victim is a command that is killed, and run again by the same program or another.
type victim struct {
	name     string
	args     []string
	killed   string // the program, "ours" or a version of restic
	then     string
	pruned   bool // the snapshots that go are forgotten before
	deadLock bool // dead processes have left locks
	kills    int  // so many, for certain
}

// signs are what shows that a command has begun: it has taken a lock; it has changed
// something else.
const signs = 2

// rest is how long a command goes on after each sign.
type rest [signs]time.Duration

// killing is the ground of the test that kills commands.
type killing struct {
	*mixed
	whole, forgotten string // folders with the repository
	locks            string // folder with locks of dead processes
}

// kindsOf are the files by which the signs show.
var kindsOf = [signs][]string{{"locks"}, {"data", "index", "snapshots"}}

// shows gives what tells, for each sign, whether it has shown.
func (e *env) shows(v victim) [signs]func() bool {
	var out [signs]func() bool
	for i, kinds := range kindsOf {
		if v.deadLock {
			kinds = kindsOf[0] // all that it does
		}
		state := func() (s string) {
			for _, k := range kinds {
				s += strings.Join(e.files(k), "\n")
			}
			return s
		}
		before := state()
		out[i] = func() bool { return state() != before }
	}
	return out
}

// fresh is a copy of the repository as the victim finds it.
func (k *killing) fresh(v victim) *env {
	k.t.Helper()
	e := *k.env
	e.repo = filepath.Join(k.t.TempDir(), "repo")
	from := k.whole
	if v.pruned {
		from = k.forgotten
	}
	run(k.t, "cp", "-a", from, e.repo)
	e.vars = append(slices.Clone(k.vars), "RESTIC_REPOSITORY="+e.repo)
	if v.deadLock {
		run(k.t, "cp", "-a", k.locks+"/.", filepath.Join(e.repo, "locks"))
	}
	return &e
}

func (v victim) start(e *env) *running {
	if v.killed == "ours" {
		return e.start(append([]string{"-q"}, v.args...)...)
	}
	return e.startProgram(restics[v.killed], v.args...)
}

// measure has the victim run to its end.
func (k *killing) measure(v victim) (w rest) {
	k.t.Helper()
	e := k.fresh(v)
	shows := e.shows(v)
	b := v.start(e)
	var at [signs]time.Time
	for !b.ended() {
		for i, shown := range shows {
			if at[i].IsZero() && shown() {
				at[i] = time.Now()
			}
		}
		time.Sleep(200 * time.Microsecond)
	}
	ended := time.Now()
	if res := b.result(); res.code != 0 {
		k.t.Fatalf("%s: %+v", v.name, res)
	}
	for i := range w {
		if !at[i].IsZero() {
			w[i] = ended.Sub(at[i])
		}
	}
	if err := os.RemoveAll(e.repo); err != nil {
		k.t.Fatal(err)
	}
	return w
}

// kill lets the victim show a sign and go on for a part of the time that it takes from there.
func (k *killing) kill(v victim, w rest, round int) (killed bool) {
	k.t.Helper()
	e := k.fresh(v)
	sign := 1
	if round%4 == 0 { // else it would mostly be killed while it waits for its lock to be certain
		sign = 0
	}
	shown := e.shows(v)[sign]
	b := v.start(e)
	for !b.ended() && !shown() {
		time.Sleep(200 * time.Microsecond)
	}
	time.Sleep(time.Duration(k.r.Float64() * 0.9 * float64(w[sign])))
	_ = b.cmd.Process.Kill() // it may have ended
	res := b.result()
	switch res.code {
	case 0:
		if err := os.RemoveAll(e.repo); err != nil {
			k.t.Fatal(err)
		}
		return false
	case -1:
		k.after(e, v, round)
		return true
	}
	k.t.Fatalf("%s: %+v", v.name, res)
	return false
}

// after checks the repository, has the command run again, and checks what came of it.
func (k *killing) after(e *env, v victim, round int) {
	k.t.Helper()
	again := func(args ...string) {
		k.t.Helper()
		if v.then == "ours" {
			e.must(append([]string{"-q"}, args...)...)
		} else {
			e.restic(v.then, args...)
		}
	}
	// The lock of a dead process on this host is seen to be that.
	again("unlock")
	locks := slices.DeleteFunc(e.files("locks"), func(name string) bool { return strings.Contains(name, "-tmp-") })
	if len(locks) > 0 {
		k.t.Fatalf("%s: locks are left: %v", v.name, locks)
	}
	again("check")
	if round%5 == 1 {
		e.restic([]string{"0.14", "0.18"}[round/5%2], "check")
	}
	again(v.args...)
	e.must("-q", "check", "--read-data")
	if round%3 == 0 || v.then != v.killed {
		e.restic("0.18", "check", "--read-data")
	}
	kept := slices.Sorted(maps.Keys(k.devices))
	id := kept[round%len(kept)]
	e.restoresTo(id, k.devices[id])
	if err := os.RemoveAll(e.repo); err != nil {
		k.t.Fatal(err)
	}
}

// leaveLocks has processes die under locks, and keeps those.
func (k *killing) leaveLocks(n int) {
	k.t.Helper()
	e := k.fresh(victim{})
	for i := range n {
		dying := e.start(append(slowly, "-q", "backup", "--changes", "full", k.img)...)
		dying.until(k.t, "it has a lock", func() bool {
			return len(slices.DeleteFunc(e.files("locks"), func(name string) bool { return strings.Contains(name, "-tmp-") })) > i
		})
		_ = dying.cmd.Process.Kill()
		dying.result()
	}
	k.locks = filepath.Join(e.repo, "locks")
}

// TestKilledCommandsLoseNothing kills each command at random points of its work, checks, and
// runs it again; also where stock restic goes on with what ours has begun, and the other way round.
func TestKilledCommandsLoseNothing(t *testing.T) {
	t.Parallel()
	k := &killing{mixed: newMixed(lightEnv(t), random(t))}
	for range 4 {
		k.back()
	}
	k.whole = k.repo
	all := slices.Sorted(maps.Keys(k.devices))
	gone := all[2:]
	for _, id := range gone {
		delete(k.devices, id)
	}
	fillRange(t, direct(t, k.img), k.c, 0, 3<<20) // for the next backup
	e := k.fresh(victim{})
	e.must(append([]string{"-q", "forget"}, gone...)...)
	k.forgotten = e.repo
	k.leaveLocks(5)

	prune := []string{"prune", "--max-unused", "0"}
	few := count(16, 4)
	for _, v := range []victim{
		{name: "forget", args: append([]string{"forget"}, gone...), kills: few},
		{name: "forget --prune", args: append([]string{"forget", "--prune", "--max-unused", "0"}, gone...), kills: few},
		{name: "prune", args: prune, pruned: true, kills: few},
		{name: "repair index", args: []string{"repair", "index", "--read-all-packs"}, kills: few},
		{name: "backup", args: []string{"backup", k.img, "--changes", "full"}, kills: few},
		{name: "unlock", args: []string{"unlock"}, deadLock: true, kills: few},
		{name: "prune, restic's after ours", args: prune, pruned: true, then: "0.18", kills: count(8, 1)},
		{name: "prune, ours after restic's", args: prune, pruned: true, killed: "0.18", kills: count(8, 1)},
	} {
		if v.killed == "" {
			v.killed = "ours"
		}
		if v.then == "" {
			v.then = "ours"
		}
		w := k.measure(v)
		killed, round := 0, 1
		for ; killed < v.kills && round <= 8*v.kills; round++ {
			if k.kill(v, w, round) {
				killed++
			}
		}
		t.Logf("%s: %d kills in %d rounds; it goes on for %v after it has its lock, and for %v after it has changed something", v.name, killed, round-1, w[0], w[1])
		if killed < v.kills {
			t.Errorf("%s: only %d kills came in time", v.name, killed)
		}
	}
}
