// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
)

// network is what lies between the commands and a MinIO: one that can be made bad, and
// a gate behind it.
type network struct {
	t     testing.TB
	proxy *toxiproxy.Proxy
	gate  *gate
}

// gate passes requests on to a store, and can be closed before any of them.
type gate struct {
	mu     sync.Mutex
	seen   int           // requests
	closes int           // before this request; 0: never
	closed chan struct{} // a request waits
	opened chan struct{}
}

// close has all requests wait from the n-th from now on, for open.
func (g *gate) close(n int) (closed <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closes, g.closed, g.opened = g.seen+n, make(chan struct{}), make(chan struct{})
	return g.closed
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closes > 0 {
		g.closes = 0
		close(g.opened)
	}
}

func (g *gate) requests() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.seen
}

// pass returns when the gate is open for a request.
func (g *gate) pass(r *http.Request) {
	g.mu.Lock()
	g.seen++
	waits, opened := g.closes > 0 && g.seen >= g.closes, g.opened
	if waits && g.seen == g.closes {
		close(g.closed)
	}
	g.mu.Unlock()
	if waits {
		select {
		case <-opened:
		case <-r.Context().Done():
		}
	}
}

func newNetwork(t testing.TB, upstream string) *network {
	t.Helper()
	g := &gate{}
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: upstream})
	to.ErrorLog = log.New(io.Discard, "", 0) // requests that broke off on purpose
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.pass(r)
		to.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	t.Cleanup(g.open)
	upstream = server.Listener.Addr().String()
	api := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	n := &network{t, toxiproxy.NewProxy(api, "store", "127.0.0.1:0", upstream), g}
	if err := n.proxy.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.proxy.Stop)
	return n
}

// poison has a toxic work on what goes up to the store and what comes down.
func (n *network) poison(kind, attributes string) {
	n.t.Helper()
	for _, stream := range []string{"upstream", "downstream"} {
		toxic := fmt.Sprintf(`{"name":%q,"type":%q,"stream":%q,"toxicity":1,"attributes":%s}`, stream, kind, stream, attributes)
		if _, err := n.proxy.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
			n.t.Fatal(err)
		}
	}
}

func (n *network) heal() { n.proxy.Toxics.ResetToxics(context.Background()) }

// TestBadNetwork: a network that is slow, or bad for a while in the middle of it, fails
// no backup, restore or prune; one that stays bad fails them clearly, and all that was
// there still is; and a store that does not answer holds up nobody who interrupts them.
func TestBadNetwork(t *testing.T) {
	s := miniotest.Start(t)
	s.MakeBucket("backups")
	near := newEnv(t, s.Location("backups", "repo"), s.Environ()...)
	s.Setenv(t)
	near.initLight()
	n := newNetwork(t, s.Host)
	far := newEnv(t, "s3:http://"+n.proxy.Listen+"/backups/repo", s.Environ()...)
	const size = 6 << 20
	r := random(t)
	c := newContent(r, false)
	img := image(t, c, size)
	far.backup(img)
	to := filepath.Join(t.TempDir(), "to")
	// changed writes what the next backup has to store.
	changed := func() {
		f := direct(t, img)
		fillRange(t, f, c, r.Int64N(3)<<20, 2<<20)
		f.Close()
	}
	commands := map[string][]string{
		"backup":  {"backup", img},
		"restore": {"restore", "latest", to, "--force"},
		"prune":   {"forget", "--keep-last", "2", "--prune", "--max-unused", "0"},
	}
	whole := func(command string) {
		t.Helper()
		if command == "restore" {
			same(t, img, to)
		}
	}
	order := []string{"backup", "restore", "prune"}
	requests := map[string]int{}
	for _, bad := range []struct{ kind, attributes string }{
		{"latency", `{"latency":30,"jitter":20}`},
		{"bandwidth", `{"rate":4000}`},
		{"slow_close", `{"delay":300}`},
		{"slicer", `{"average_size":20000,"size_variation":10000,"delay":50}`},
	} {
		t.Run(bad.kind, func(t *testing.T) {
			for _, command := range order {
				if command == "backup" {
					changed()
				}
				n.poison(bad.kind, bad.attributes)
				before := n.gate.requests()
				far.must(append([]string{"-q"}, commands[command]...)...)
				n.heal()
				requests[command] = n.gate.requests() - before
				whole(command)
			}
		})
	}
	// What passes is there until the command has met it, and says so.
	for _, bad := range []struct {
		kind, attributes string
		always           bool // it strikes what is large: no request is to wait
	}{
		{"reset_peer", `{"timeout":20}`, false},
		{"timeout", `{"timeout":300}`, false},
		{"limit_data", `{"bytes":5000}`, true},
	} {
		t.Run(bad.kind, func(t *testing.T) {
			defer n.heal()
			defer n.gate.open()
			for _, command := range order {
				if command == "backup" {
					changed()
				}
				at := 1 + r.IntN(requests[command]*3/4)
				var b *told
				if bad.always {
					n.poison(bad.kind, bad.attributes)
					b = far.tell(commands[command]...)
				} else {
					closed := n.gate.close(at)
					b = far.tell(commands[command]...)
					b.await(t, closed, "its request")
					n.poison(bad.kind, bad.attributes)
					n.gate.open() // the answer to that request is what it meets
				}
				b.await(t, b.said, "its first retry")
				n.heal()
				res := b.result()
				t.Logf("%s, at request %d of about %d: %d lines on stderr", command, at, requests[command], strings.Count(b.stderr(), "\n"))
				if res.code != 0 {
					t.Fatalf("%s: %+v\n%s", command, res, b.stderr())
				}
				whole(command)
			}
		})
	}
	for _, bad := range []struct{ kind, attributes string }{
		{"reset_peer", `{"timeout":0}`}, {"timeout", `{"timeout":200}`}, {"limit_data", `{"bytes":300}`},
	} {
		t.Run(bad.kind+"ForGood", func(t *testing.T) {
			for _, command := range order {
				if command == "backup" {
					changed()
				}
				n.poison(bad.kind, bad.attributes)
				res := far.try(append([]string{"-q", "--retry-store", "1s"}, commands[command]...)...)
				n.heal()
				lines := strings.Split(strings.TrimSpace(res.stderr), "\n")
				t.Logf("%s: %s", command, lines[len(lines)-1])
				if res.code != 1 || !strings.Contains(res.stderr, n.proxy.Listen) {
					t.Fatalf("%s: %+v", command, res)
				}
			}
		})
	}
	// A store that takes requests and never answers keeps nobody who wants to go.
	// A prune may find nothing to do here, but opens and locks the repository.
	for command, most := range map[string]int{"backup": requests["backup"] * 3 / 4, "prune": 8} {
		t.Run("interrupted/"+command, func(t *testing.T) {
			if command == "backup" {
				changed()
			}
			defer n.gate.open()
			closed := n.gate.close(1 + r.IntN(most))
			b := far.tell(commands[command]...)
			b.await(t, closed, "its request")
			if err := b.cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			b.await(t, b.done, "its end")
			n.gate.open()
			if res := b.result(); res.code != 130 {
				t.Errorf("%+v\n%s", res, b.stderr())
			}
			near.must("unlock")
		})
	}
	near.must("unlock")
	if sum := far.backup(img); sum.Parent == nil {
		t.Errorf("the next backup does not go on: %+v", sum)
	}
	far.must("-q", "restore", "latest", to, "--force")
	same(t, img, to)
	far.must("prune", "--max-unused", "0")
	near.must("-q", "check", "--read-data")
	near.restic("0.18", "check", "--read-data")
	if err := os.Remove(to); err != nil {
		t.Fatal(err)
	}
}

// told is a command whose first retry is waited for.
type told struct {
	*running
	said chan struct{} // closed by it

	mu   sync.Mutex
	errs bytes.Buffer
}

func (e *env) tell(args ...string) *told {
	e.t.Helper()
	b := &told{running: &running{cmd: e.command(append([]string{"-q", "--retry-store", "5m"}, args...)...), done: make(chan struct{})}, said: make(chan struct{})}
	b.cmd.Stdout, b.cmd.Stderr = &b.out, b
	if err := b.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	go func() {
		_ = b.cmd.Wait() // how it ended is in ProcessState
		close(b.done)
	}()
	return b
}

// Write takes what the command says on stderr.
func (b *told) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := bytes.Contains(b.errs.Bytes(), []byte("trying again"))
	b.errs.Write(p)
	if !before && bytes.Contains(b.errs.Bytes(), []byte("trying again")) {
		close(b.said)
	}
	return len(p), nil
}

func (b *told) stderr() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.errs.String()
}

// await waits for something that the command must come to: a command that needs a
// SIGKILL hangs.
func (b *told) await(t testing.TB, what <-chan struct{}, name string) {
	t.Helper()
	select {
	case <-what:
	case <-b.done:
		select {
		case <-what:
		default:
			t.Fatalf("it ended before %s: %+v\n%s", name, b.result(), b.stderr())
		}
	case <-time.After(40 * time.Second):
		_ = b.cmd.Process.Kill()
		<-b.done
		t.Fatalf("it hangs before %s:\n%s", name, b.stderr())
	}
}
