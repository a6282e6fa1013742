// SPDX-License-Identifier: BSD-2-Clause

package contender

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/bench/content"
	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "receiver" {
		os.Exit(Receiver(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func TestWhatRsyncSentIsBothWays(t *testing.T) {
	const stats = "Number of files: 1 (special: 1)\nTotal file size: 5 bytes\n\nTotal bytes sent: 1,234,567\nTotal bytes received: 33\n\nsent 1,234,567 bytes"
	if n, err := rsyncSent(stats); err != nil || n != 1234600 {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := rsyncSent("Total bytes sent: 1\n"); err == nil {
		t.Error("half of it is enough")
	}
}

// testLab is a lab with a small device, which is not tracked.
func testLab(t *testing.T) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("run it as root: it makes a loop device")
	}
	dir := t.TempDir()
	disk, err := host.NewDisk(context.Background(), filepath.Join(dir, "disk"), 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := disk.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := content.FillDevice(disk.Path, content.New(1, true), 8<<20); err != nil {
		t.Fatal(err)
	}
	l := &Lab{Disk: disk, Dir: dir, State: filepath.Join(dir, "state")}
	l.Self, _ = os.Executable()
	l.Rsync, _ = exec.LookPath("rsync")
	return l
}

// The copies follow the device, and one that does not is noticed.
func TestCopiesFollowTheDevice(t *testing.T) {
	l := testLab(t)
	for i, name := range []string{"rsync in place", "rsync whole file", "copy"} {
		t.Run(name, func(t *testing.T) {
			c, err := New(t.Context(), name, l, i)
			if err != nil {
				t.Fatal(err)
			}
			m := content.New(uint64(i)+5, true)
			for round := range 2 {
				row := result.Unknown()
				if err := host.DropCaches(); err != nil {
					t.Fatal(err)
				}
				if err := c.Sync(t.Context(), &row); err != nil {
					t.Fatal(err)
				}
				if row.Seconds <= 0 || row.SourceCPU < 0 || row.Read < 8<<20 || row.Sent <= 0 || row.Memory <= 0 {
					t.Errorf("round %d: %+v", round, row)
				}
				if name == "rsync in place" && round == 1 && row.Sent > 4<<20 {
					t.Errorf("%d bytes went over the pipe for 8 blocks", row.Sent)
				}
				if err := c.Verify(t.Context()); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
				if err := content.Write(l.Disk.Path, m, m.Random(2048, 8)); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Verify(t.Context()); err == nil {
				t.Error("a copy that is behind is not noticed")
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestEveryNameIsATool(t *testing.T) {
	// None is installed here: each says so, or is refused for its missing part.
	l := &Lab{Dir: t.TempDir(), Disk: &host.Disk{}}
	for i, name := range Names {
		if _, err := New(t.Context(), name, l, i); err != nil && strings.Contains(err.Error(), "no tool") {
			t.Error(err)
		}
	}
	if _, err := New(t.Context(), "rsnyc", l, 99); err == nil {
		t.Error("a name that is not one is accepted")
	}
}

func TestTheProxyCountsWhatIsSent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(io.Discard, c)
		_, _ = c.Write([]byte("done"))
	}()
	p, err := newProxy(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer p.l.Close()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	_, _ = io.ReadAll(c)
	c.Close()
	if n := p.sent.Load(); n != 100_000 {
		t.Errorf("%d bytes", n)
	}
}
