// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"fmt"
	"io"
	"log"
	"math"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
)

// witness lies between commands and a MinIO, and knows afterwards in which order each of
// them asked the store for what.
type witness struct {
	t     testing.TB
	store *miniotest.Server

	mu       sync.Mutex
	clock    int // counts where requests begin and end
	commands []*asker
}

// asker is one command on a host of its own name.
type asker struct {
	name, host string
	exclusive  bool // it asks for an exclusive lock
	killed     bool

	// gate holds its writes, beside locks, until it is closed. Nil: nothing is held.
	gate    chan struct{}
	arrived chan struct{} // closed when the first one is held
	once    sync.Once

	requests []*request
}

// request is what a command asked the store for, from when the witness began to pass it on
// until it had the answer.
type request struct {
	method, kind, name string
	began, ended       int
}

// writes tells whether the request changed the repository, beside its locks.
func (r *request) writes() bool {
	return r.kind != "locks" && r.method != http.MethodGet && r.method != http.MethodHead
}

// slow is by how much each request of a command with an exclusive lock is delayed: who comes
// past that lock has time to be seen.
const slow = 20 * time.Millisecond

// watch prepares a command as that of a host, and sends what it asks for through the witness
// until the test ends.
func (w *witness) watch(e *env, c *asker, program string, args ...string) *exec.Cmd {
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", w.store.Host
			r.Out.Host = r.In.Host // it is signed
		},
		ErrorLog: log.New(io.Discard, "", 0), // who is refused drops what it was reading ahead
	}
	server := httptest.NewServer(http.HandlerFunc(func(to http.ResponseWriter, from *http.Request) {
		r := &request{method: from.Method}
		path := strings.Split(strings.TrimPrefix(from.URL.Path, "/backups/"), "/")
		if prefix := from.URL.Query().Get("prefix"); prefix != "" {
			path = strings.Split(prefix, "/") // a listing
		}
		if len(path) > 1 {
			r.kind, r.name = path[1], path[len(path)-1]
		}
		if c.gate != nil && r.writes() {
			c.once.Do(func() { close(c.arrived) })
			<-c.gate
			if c.killed {
				return
			}
		}
		if c.exclusive {
			time.Sleep(slow)
		}
		w.mu.Lock()
		w.clock++
		r.began = w.clock
		w.mu.Unlock()
		pass.ServeHTTP(to, from)
		w.mu.Lock()
		w.clock++
		r.ended = w.clock
		c.requests = append(c.requests, r)
		w.mu.Unlock()
	}))
	w.t.Cleanup(server.Close)
	w.mu.Lock()
	w.commands = append(w.commands, c)
	w.mu.Unlock()
	cmd := e.prepare("unshare", append([]string{"--uts", "sh", "-c", `hostname "$0" && exec "$@"`, c.host, program}, args...)...)
	cmd.Env = append(cmd.Env, "RESTIC_REPOSITORY=s3:"+server.URL+"/backups/repo")
	return cmd
}

// span is a time of a command, by the witness's clock.
type span struct {
	*asker
	from, to int
}

func (s span) String() string {
	return fmt.Sprintf("%s on %s (exclusive: %t, %d to %d)", s.name, s.host, s.exclusive, s.from, s.to)
}

// locks are the times from when the store had a lock of the command to when the command
// removed it: several, if it tried again.
func (c *asker) locks() (held []span) {
	last := map[string]int{}
	for _, r := range c.requests {
		switch {
		case r.kind != "locks":
		case r.method == http.MethodPut:
			last[r.name] = len(held)
			held = append(held, span{c, r.ended, math.MaxInt})
		case r.method == http.MethodDelete:
			if i, own := last[r.name]; own {
				held[i].to = r.began
			}
		}
	}
	return held
}

// work is from the first to the last request that a command may make under its lock only. Ours
// read ahead while a shared lock is not certain yet.
func (c *asker) work() (work span, any bool) {
	work = span{c, math.MaxInt, 0}
	for _, r := range c.requests {
		if r.writes() || c.exclusive && (r.kind == "data" || r.kind == "index" || r.kind == "snapshots") {
			work.from, work.to, any = min(work.from, r.began), max(work.to, r.ended), true
		}
	}
	return work, any
}

// overlooks tells whether the command looked for locks and then wrote its own, all while
// another was at work under an exclusive one.
func (c *asker) overlooks(x span) bool {
	looked := false
	for _, r := range c.requests {
		switch {
		case r.kind != "locks" || r.began < x.from || r.ended > x.to:
			looked = looked && r.kind != "locks"
		case r.method == http.MethodPut && looked:
			return true
		case r.name == "":
			looked = true
		}
	}
	return false
}

// testify holds what was seen to what locks promise. Both programs write a lock, look
// whether another is in the way, and remove it again if so: that two locks are there at the
// same time says nothing, but to work under both is wrong.
func (w *witness) testify() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	owners := map[string]*asker{}
	for _, c := range w.commands {
		slices.SortFunc(c.requests, func(a, b *request) int { return a.began - b.began })
		for _, r := range c.requests {
			if r.kind == "locks" && r.method == http.MethodPut {
				owners[r.name] = c
			}
		}
	}
	var works []span
	for _, c := range w.commands {
		held := c.locks()
		for _, r := range c.requests {
			if r.kind == "locks" && r.method == http.MethodDelete {
				if owner := owners[r.name]; owner != c && (!owner.killed || owner.host != c.host) {
					w.t.Errorf("%s on %s removed a lock of %s on %s", c.name, c.host, owner.name, owner.host)
				}
			}
			if r.writes() && !slices.ContainsFunc(held, func(s span) bool { return s.from < r.began && r.ended < s.to }) {
				w.t.Errorf("%s on %s: %s %s/%s without a lock", c.name, c.host, r.method, r.kind, r.name)
			}
		}
		if s, any := c.work(); any {
			works = append(works, s)
		}
	}
	for _, x := range works {
		for _, c := range w.commands {
			if x.exclusive && x.asker != c && c.overlooks(x) {
				w.t.Errorf("%s on %s wrote a lock though it had looked while there was that of %s", c.name, c.host, x)
			}
		}
	}
	together := 0
	for i, a := range works {
		for _, b := range works[:i] {
			if a.to < b.from || b.to < a.from {
				continue
			}
			together++
			if a.exclusive || b.exclusive {
				w.t.Errorf("%s worked while %s did", a, b)
			}
		}
	}
	w.t.Logf("%d commands, %d of them worked, %d pairs at the same time", len(w.commands), len(works), together)
	if together < 3 {
		w.t.Error("nothing was at work at the same time")
	}
}
