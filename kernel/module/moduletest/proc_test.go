// SPDX-License-Identifier: BSD-2-Clause

package moduletest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

const envRead = "DSYNC_TEST_READ"

// TestMain makes the binary a program that opens a file, for other users.
func TestMain(m *testing.M) {
	if path := os.Getenv(envRead); path != "" {
		_, err := os.OpenFile(path, os.O_RDONLY, 0)
		fmt.Print(err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// openAs is what opening a file says to a process with credentials or without
// capabilities.
func openAs(t *testing.T, path string, attr *syscall.SysProcAttr) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{envRead + "=" + path}
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func TestOnlyRootReads(t *testing.T) {
	d := onLoop(t, "secret", 4*mib)
	for name, mode := range map[string]os.FileMode{"": 0o500, "status": 0o400, "active": 0o400, "frozen": 0o400, "blocks": 0o600} {
		info, err := os.Stat(d.file(name))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%q: mode %v, %v", name, info.Mode(), err)
		}
		if said := openAs(t, d.file(name), &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}); !strings.Contains(said, "permission denied") {
			t.Errorf("%q as nobody: %s", name, said)
		}
	}
	// root of its own user namespace is not root here.
	root := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}, GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}
	if said := openAs(t, d.file("active"), root); !strings.Contains(said, "operation not permitted") {
		t.Errorf("without CAP_SYS_ADMIN: %s", said)
	}
	if b, err := os.ReadFile(filepath.Join(proc, "version")); err != nil || string(b) != "1.0.0\n" {
		t.Errorf("version %q: %v", b, err)
	}
}

// waitFor waits for what a work item of the kernel does.
func waitFor(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func TestRenamesAndCollisions(t *testing.T) {
	d := onLoop(t, "one", 4*mib)
	d.put(1)
	f, err := os.Open(d.file("status"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	number := d.status()["device"]
	if err := devmapper.Rename(t.Context(), "one", "two"); err != nil {
		t.Fatal(err)
	}
	dmtest.RemoveAtEnd(t, "two")
	d.want("name two") // in the old directory
	other := onLoop(t, "one", 4*mib)
	other.name = other.numbered(number) // collides until the first is resumed
	other.put2(3)
	d.name = "two"
	d.suspend(devmapper.SuspendOptions{})
	d.resume()
	waitFor(t, proc+"/two/status")
	d.want("name two", "device "+number, "dirty 1")
	if _, err := f.Read(make([]byte, 10)); err == nil {
		t.Error("a file of the old directory still reads")
	}
	o := device{t, "one"}
	o.suspend(devmapper.SuspendOptions{})
	o.resume()
	for d.hasDir(other.name) {
		time.Sleep(time.Millisecond)
	}
	waitFor(t, proc+"/one/status")
	o.want("name one", "dirty 1")
}

func (d device) hasDir(name string) bool {
	_, err := os.Stat(filepath.Join(proc, name))
	return err == nil
}

// numbered finds the directory with a number for a name, of another device than that.
func (d device) numbered(not string) string {
	d.t.Helper()
	dirs, err := filepath.Glob(proc + "/*:*")
	if err != nil || len(dirs) != 1 || filepath.Base(dirs[0]) == not {
		d.t.Fatalf("%v: %v", dirs, err)
	}
	return filepath.Base(dirs[0])
}

func (d device) put2(i int64) { device{d.t, "one"}.put(i) }

// Names that /proc has no place for get a directory by number; nothing is logged.
func TestNamesThatDoNotFit(t *testing.T) {
	need(t)
	loop := dmtest.Loop(t, 4*mib, dmtest.LoopOptions{})
	for _, name := range []string{"version", "1:2", "253:0", "0:0", strings.Repeat("n", 127), "a:1", "1:2:3", "x"} {
		t.Run(name[:1], func(t *testing.T) {
			dmtest.Map(t, name, line(loop, 0, 8))
			info, err := devmapper.Stat(name)
			if err != nil {
				t.Fatal(err)
			}
			dir := name
			if name == "version" || name == "1:2" || name == "253:0" || name == "0:0" {
				dir = fmt.Sprintf("%d:%d", info.Major(), info.Minor())
			}
			device{t, dir}.want("name "+name, "blocks 1")
		})
	}
}

// Messages, reads and resizes from several sides at once neither hang nor lose.
func TestEverythingAtOnce(t *testing.T) {
	need(t)
	const size = 64 * mib
	loop := dmtest.Loop(t, size, dmtest.LoopOptions{})
	d := newDevice(t, "busy", loop, size/sector)
	f := d.open(os.O_RDWR | unix.O_DIRECT)
	stop := make(chan struct{})
	done := make(chan struct{})
	run := func(fn func()) {
		go func() {
			defer func() { done <- struct{}{} }()
			for {
				select {
				case <-stop:
					return
				default:
					fn()
				}
			}
		}()
	}
	n := int64(0)
	run(func() { n++; _, _ = f.WriteAt(aligned(block), n%16384*block) })
	run(func() { _ = d.message("rotate %s", nonce); _ = d.message("ack %s", "0") })
	run(func() { _ = d.message("restart"); _ = d.message("invalidate x"); _ = d.message("mark 0 100") })
	for _, name := range []string{"status", "active", "frozen", "blocks"} {
		run(func() { _, _ = os.ReadFile(d.file(name)) })
	}
	run(func() { _ = os.WriteFile(d.file("blocks"), []byte("clear"), 0) })
	run(func() { _, _ = devmapper.Status(d.name, devmapper.Query{}) })
	for i := range 30 {
		d.reload(line(loop, 0, uint64(size/sector-8*(i%5)-i%3)))
	}
	d.reload(line(loop, 0, size/sector))
	close(stop)
	for range 9 {
		<-done
	}
	d.tell("restart")
	d.put(5)
	same(t, "afterwards", d.turn(), blocksOf(size/block, 5))
	d.want("state valid")
}
