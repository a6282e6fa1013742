// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
)

// clients are programs of several hosts that use one repository at the same time.
type clients struct {
	*witness
	devices []*client
	others  map[string]*env // of hosts without a device

	refused atomic.Int64 // commands that a lock kept from working
	mu      sync.Mutex
	truth   map[string]string // what device snapshots hold, by ID
}

// client is a host with a device and caches of its own.
type client struct {
	*env
	host, img string
	c         *content
}

func newClients(t *testing.T) *clients {
	s := miniotest.Start(t)
	s.MakeBucket("backups")
	s.Setenv(t)
	first := newEnv(t, s.Location("backups", "repo"), s.Environ()...)
	first.initLight()
	m := &clients{witness: &witness{t: t, store: s}, others: map[string]*env{}, truth: map[string]string{}}
	for i := range 4 {
		c := newContent(random(t), true)
		m.devices = append(m.devices, &client{newEnv(t, first.repo, s.Environ()...), fmt.Sprint("client", i), image(t, c, 4<<20), c})
	}
	for _, host := range []string{"keeper", "files"} {
		m.others[host] = newEnv(t, first.repo, s.Environ()...)
	}
	return m
}

// write changes a device, and returns a copy of what it holds then.
func (c *client) write() (truth string) {
	f := direct(c.t, c.img)
	defer f.Close()
	writeBlocks(c.t, f, c.c, someBlocks(c.c.r, 4<<20, 60))
	truth = filepath.Join(c.t.TempDir(), "truth")
	run(c.t, "cp", c.img, truth)
	return truth
}

func (c *client) backupArgs() []string { return []string{"backup", "--json", c.img} }

// once runs a command on a host, and says how it ended.
func (m *clients) once(e *env, host string, exclusive bool, program string, args ...string) result {
	w := &asker{name: filepath.Base(program) + " " + strings.Join(args, " "), host: host, exclusive: exclusive}
	return finish(m.t, m.watch(e, w, program, args...))
}

// untilDone runs a command again and again until no lock is in its way.
func (m *clients) untilDone(e *env, host string, exclusive bool, program string, args ...string) string {
	for {
		switch r := m.once(e, host, exclusive, program, args...); r.code {
		case 0:
			return r.stdout
		case 11:
			m.refused.Add(1)
			time.Sleep(200*time.Millisecond + time.Duration(rand.Int64N(int64(200*time.Millisecond))))
		default:
			m.t.Errorf("%s %q on %s: %+v", program, args, host, r)
			return ""
		}
	}
}

// held is a command in the middle of its work.
type held struct {
	*asker
	cmd       *exec.Cmd
	out, errs strings.Builder
}

// hold starts a command that will be held before it first writes, beside locks.
func (m *clients) hold(e *env, host string, exclusive bool, program string, args ...string) *held {
	m.t.Helper()
	h := &held{asker: &asker{name: "held " + filepath.Base(program), host: host, exclusive: exclusive, gate: make(chan struct{}), arrived: make(chan struct{})}}
	h.cmd = m.watch(e, h.asker, program, args...)
	h.cmd.Stdout, h.cmd.Stderr = &h.out, &h.errs
	if err := h.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	return h
}

// goOn lets it do the rest, and returns what it printed.
func (h *held) goOn(t testing.TB) string {
	t.Helper()
	close(h.gate)
	if err := h.cmd.Wait(); err != nil && !h.killed {
		t.Errorf("%s on %s: %v: %s", h.name, h.host, err, &h.errs)
		return ""
	}
	return h.out.String()
}

// saved takes note of what a device snapshot has to give.
func (m *clients) saved(out, truth string) {
	if out == "" {
		return // it failed
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.truth[summary(m.t, out).SnapshotID.String()] = truth
}

var (
	keepTwo  = []string{"forget", "--keep-last", "2"}
	andPrune = []string{"--prune", "--max-unused", "0"}
)

// oneDies has four backups in their midst, by locks of four hosts. Nobody gets an exclusive
// lock, and no lock goes, but that of one that was killed, by an unlock on its host.
func (m *clients) oneDies() {
	keeper := m.others["keeper"]
	var all []*held
	var truths []string
	for _, c := range m.devices {
		truths = append(truths, c.write())
		all = append(all, m.hold(c.env, c.host, false, dsync, c.backupArgs()...))
	}
	for _, h := range all {
		<-h.arrived
	}
	locks := func(want int, why string) {
		m.t.Helper()
		hosts := map[string]bool{}
		for _, id := range strings.Fields(keeper.restic("0.18", "list", "locks", "--no-lock")) {
			var l struct {
				Hostname  string
				Exclusive bool
			}
			if err := json.Unmarshal([]byte(keeper.restic("0.18", "cat", "lock", id, "--no-lock")), &l); err != nil || l.Exclusive {
				m.t.Fatalf("%s: %+v, %v", why, l, err)
			}
			hosts[l.Hostname] = true
		}
		if len(hosts) != want {
			m.t.Errorf("%s: locks of %d hosts, want %d: %v", why, len(hosts), want, hosts)
		}
	}
	refused := func() {
		m.t.Helper()
		for _, program := range []string{dsync, restics["0.18"]} {
			if r := m.once(keeper, "keeper", true, program, keepTwo...); r.code != 11 {
				m.t.Errorf("%s: %+v", program, r)
			}
		}
	}
	unlock := func(host string, e *env) {
		m.t.Helper()
		for _, program := range []string{dsync, restics["0.18"]} {
			if r := m.once(e, host, false, program, "unlock"); r.code != 0 {
				m.t.Errorf("%s: %+v", program, r)
			}
		}
	}
	refused()
	unlock("client0", m.devices[0].env)
	unlock("keeper", keeper)
	locks(4, "all are alive")

	all[0].killed = true
	if err := all[0].cmd.Process.Kill(); err != nil {
		m.t.Fatal(err)
	}
	for i, h := range all {
		if out := h.goOn(m.t); i > 0 {
			m.saved(out, truths[i])
		}
	}
	refused()
	unlock("client1", m.devices[1].env)
	locks(1, "another host does not know that it is dead")
	// Each program has its turn to be the first to find it.
	r := m.once(m.devices[0].env, "client0", false, []string{dsync, restics["0.18"]}[rand.IntN(2)], "unlock")
	if r.code != 0 {
		m.t.Errorf("unlock: %+v", r)
	}
	locks(0, "its own host does")
}

// oneAlone has a forget in its midst, by an exclusive lock. Whoever comes is turned away, however often.
func (m *clients) oneAlone() {
	program := []string{dsync, restics["0.18"]}[rand.IntN(2)]
	h := m.hold(m.others["keeper"], "keeper", true, program, "forget", "--keep-last", "1", "--group-by", "")
	<-h.arrived
	var wg sync.WaitGroup
	for _, c := range m.devices {
		wg.Go(func() {
			for n := range 12 {
				program, args := dsync, c.backupArgs()
				if n == 0 {
					program, args = restics["0.18"], []string{"backup", c.img}
				}
				if r := m.once(c.env, c.host, false, program, args...); r.code != 11 {
					m.t.Errorf("%s %q beside an exclusive lock: %+v", program, args, r)
				}
			}
		})
	}
	wg.Wait()
	h.goOn(m.t)
}

// TestManyClientsAtOnce: four hosts back up their devices, another restic's files, while both
// programs forget, prune and unlock. The store sees that nobody works beside an
// exclusive lock, no live one's lock is removed, and whatever is kept is right.
func TestManyClientsAtOnce(t *testing.T) {
	m := newClients(t)
	if m.oneDies(); t.Failed() {
		return
	}
	m.oneAlone()
	files := sourceFiles(t, "archive")
	keeper, restic := m.others["keeper"], restics["0.18"]
	stop := make(chan struct{})
	var unlocks sync.WaitGroup
	for i, program := range []string{dsync, restic} {
		unlocks.Go(func() {
			for n := i; ; n++ {
				c := m.devices[n%len(m.devices)]
				if r := m.once(c.env, c.host, false, program, "unlock"); r.code != 0 {
					t.Errorf("unlock: %+v", r)
				}
				select {
				case <-stop:
					return
				case <-time.After(500 * time.Millisecond):
				}
			}
		})
	}
	for cycle := range count(25, 4) {
		var wg sync.WaitGroup
		for _, c := range m.devices {
			wg.Go(func() {
				truth := c.write()
				m.saved(m.untilDone(c.env, c.host, false, dsync, c.backupArgs()...), truth)
			})
		}
		wg.Go(func() { m.untilDone(m.others["files"], "files", false, restic, "backup", files) })
		for i, program := range []string{dsync, restic} {
			args := keepTwo
			if (cycle+i)%2 == 0 {
				args = slices.Concat(keepTwo, andPrune)
			}
			wg.Go(func() { m.untilDone(keeper, "keeper", true, program, args...) })
		}
		if wg.Wait(); t.Failed() {
			break
		}
	}
	close(stop)
	unlocks.Wait()
	m.testify()
	t.Logf("%d commands were refused", m.refused.Load())
	if m.refused.Load() == 0 {
		t.Error("no lock was in anybody's way")
	}
	if t.Failed() {
		return
	}
	if n := objects(t, m.store, "backups", "repo/locks/"); n > 0 {
		t.Errorf("%d locks are left", n)
	}
	keeper.must(slices.Concat(keepTwo, andPrune)...)
	keeper.must("-q", "check", "--read-data")
	keeper.restic("0.18", "check", "--read-data")
	devices := 0
	for _, id := range keeper.snapshotIDs() {
		if img, ok := m.truth[id]; ok {
			devices++
			keeper.restoresTo(id, img)
		}
	}
	if devices != 8 {
		t.Errorf("%d snapshots of 4 devices are kept, 2 of each were to be", devices)
	}
}
