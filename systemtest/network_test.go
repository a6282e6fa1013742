// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
)

// network is what lies between the commands and a MinIO.
type network struct {
	t     testing.TB
	proxy *toxiproxy.Proxy
}

func newNetwork(t testing.TB, upstream string) *network {
	t.Helper()
	api := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	n := &network{t, toxiproxy.NewProxy(api, "store", "127.0.0.1:0", upstream)}
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

// TestBadNetwork: a network that is slow, or bad for a while, fails no backup,
// restore or prune; one that stays bad fails them clearly, and all that was
// there still is.
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
	for _, bad := range []struct {
		kind, attributes string
		lasts            time.Duration // 0: all the time, and it only slows down
	}{
		{"latency", `{"latency":30,"jitter":20}`, 0},
		{"bandwidth", `{"rate":4000}`, 0},
		{"slow_close", `{"delay":300}`, 0},
		{"slicer", `{"average_size":20000,"size_variation":10000,"delay":50}`, 0},
		{"reset_peer", `{"timeout":20}`, 2 * time.Second},
		{"timeout", `{"timeout":300}`, 2 * time.Second},
		{"limit_data", `{"bytes":100000}`, 2 * time.Second},
	} {
		t.Run(bad.kind, func(t *testing.T) {
			for _, command := range []string{"backup", "restore", "prune"} {
				if command == "backup" {
					changed()
				}
				began := time.Now()
				b := far.start(append([]string{"-q", "--retry-store", "5m"}, commands[command]...)...)
				if bad.lasts > 0 { // from somewhere in the middle on
					time.Sleep(time.Duration(r.Int64N(int64(400 * time.Millisecond))))
				}
				n.poison(bad.kind, bad.attributes)
				if bad.lasts > 0 {
					time.Sleep(bad.lasts)
					n.heal()
				}
				res := b.result()
				n.heal()
				t.Logf("%s: %.1f s, %d lines on stderr", command, time.Since(began).Seconds(), strings.Count(res.stderr, "\n"))
				if res.code != 0 {
					t.Fatalf("%s: %+v", command, res)
				}
				whole(command)
			}
		})
	}
	for _, bad := range []struct{ kind, attributes string }{
		{"reset_peer", `{"timeout":0}`}, {"timeout", `{"timeout":200}`}, {"limit_data", `{"bytes":300}`},
	} {
		t.Run(bad.kind+"ForGood", func(t *testing.T) {
			for _, command := range []string{"backup", "restore", "prune"} {
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
