// SPDX-License-Identifier: BSD-2-Clause

// Command catch runs a backup of a mounted device, stops it while the file system is
// frozen, and copies the device meanwhile: what the backup's image has to be.
//
//	catch PROBE DEVICE COPY COMMAND...
//
// PROBE is a file in that file system, which catch writes to all the time. A write
// that waits for the thaw, before and after the copy, shows that the file system was
// frozen all the while; then the file /run/caught is made. A freeze that was over
// before it was seen leaves none. The exit status is the command's.
//
//	catch -kill SUSPENDED DELAY COMMAND...
//
// kills the command with SIGKILL once the file SUSPENDED (of a device-mapper device in
// /sys) says 1 and DELAY has passed, and says on its output whether it still said so.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const caught = "/run/caught"

func main() {
	if len(os.Args) < 5 {
		fmt.Fprintln(os.Stderr, "usage: catch PROBE DEVICE COPY COMMAND... | catch -kill SUSPENDED DELAY COMMAND...")
		os.Exit(2)
	}
	if os.Args[1] == "-kill" {
		if err := kill(os.Args[2], os.Args[3], os.Args[4:]); err != nil {
			fmt.Fprintln(os.Stderr, "catch:", err)
			os.Exit(3)
		}
		return
	}
	status, err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "catch:", err)
		os.Exit(3)
	}
	os.Exit(status)
}

func run(file, device, to string, command []string) (int, error) {
	_ = os.Remove(caught)
	p, err := newProbe(file)
	if err != nil {
		return 0, err
	}
	defer p.stop.Store(true)
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for done := false; ; {
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				return 0, err
			}
			return cmd.ProcessState.ExitCode(), nil
		case <-time.After(time.Millisecond):
		}
		if n := p.waits(); n != 0 && !done {
			_ = cmd.Process.Signal(unix.SIGSTOP)
			if p.waits() == n && freezeIsDone() && p.waits() == n {
				if err := copyDevice(device, to); err != nil {
					return 0, err
				}
				done = p.waits() == n
			}
			if done {
				if err := os.WriteFile(caught, nil, 0o600); err != nil {
					return 0, err
				}
			}
			_ = cmd.Process.Signal(unix.SIGCONT)
		}
	}
}

func kill(suspended, delay string, command []string) error {
	late, err := time.ParseDuration(delay)
	if err != nil {
		return err
	}
	cmd := exec.Command(command[0], command[1:]...)
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	still := func() bool {
		b, err := os.ReadFile(suspended)
		return err == nil && strings.TrimSpace(string(b)) == "1"
	}
	for !still() {
		select {
		case <-ended:
			fmt.Println("ended")
			return nil
		case <-time.After(50 * time.Microsecond):
		}
	}
	time.Sleep(late)
	said := "too late"
	if still() {
		said = "still"
	}
	_ = cmd.Process.Kill()
	<-ended
	fmt.Println(said)
	return nil
}

// probe writes to a file without end.
type probe struct {
	wchan string       // of the thread that writes
	now   atomic.Int64 // number of the write that runs, 0 between two
	stop  atomic.Bool
}

func newProbe(file string) (*probe, error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	p, ready := &probe{}, make(chan string)
	go func() {
		runtime.LockOSThread()
		ready <- fmt.Sprintf("/proc/self/task/%d/wchan", unix.Gettid())
		for n := int64(1); !p.stop.Load(); n++ {
			p.now.Store(n)
			_, _ = f.WriteAt([]byte{byte(n)}, 0)
			p.now.Store(0)
			time.Sleep(2 * time.Millisecond)
		}
	}()
	p.wchan = <-ready
	return p, nil
}

// waits returns the number of the write that waits for a thaw, 0 if none does.
func (p *probe) waits() int64 {
	n := p.now.Load()
	if n == 0 {
		return 0
	}
	// Where a write waits that a freeze holds up.
	at, err := os.ReadFile(p.wchan)
	if err != nil || !strings.HasPrefix(string(at), "percpu_rwsem_wait") || p.now.Load() != n {
		return 0
	}
	return n
}

// freezeIsDone waits until the watchdog, whose parent is stopped, is through with the
// freeze: writers have to wait long before the last block is written.
func freezeIsDone() bool {
	for rests, end := 0, time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if rests++; !watchdogRests() {
			rests = 0
		}
		if rests == 3 {
			return true
		}
	}
	return false
}

// watchdogRests reports that every thread of the watchdog waits in a system call that
// is no ioctl.
func watchdogRests() bool {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return false
	}
	for _, name := range lines {
		line, err := os.ReadFile(name)
		if err != nil || !strings.HasSuffix(string(line), "\x00freeze-watchdog\x00") {
			continue
		}
		threads, err := filepath.Glob(filepath.Join(filepath.Dir(name), "task/*/syscall"))
		if err != nil || len(threads) == 0 {
			return false
		}
		for _, thread := range threads {
			call, err := os.ReadFile(thread)
			if n, _, _ := strings.Cut(string(call), " "); err != nil || n == strconv.Itoa(unix.SYS_IOCTL) || strings.HasPrefix(n, "running") {
				return false
			}
		}
		return true
	}
	return false
}

func copyDevice(from, to string) error {
	in, err := os.OpenFile(from, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	size, err := in.Seek(0, 2)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20+4096)
	buf = buf[4096-uintptr(unsafe.Pointer(&buf[0]))%4096:][:1<<20]
	for at := int64(0); at < size; {
		n, err := in.ReadAt(buf[:min(size-at, 1<<20)], at)
		if n == 0 {
			return err
		}
		if _, err := out.WriteAt(buf[:n], at); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}
