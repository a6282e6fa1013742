// SPDX-License-Identifier: BSD-2-Clause

package looptest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const guardArg = "loop-guard"

// guardLimit is when the guard takes a test process for stuck on something
// frozen: just before go test's own limit, which could not end such a process.
func guardLimit() time.Duration {
	if os.Getenv("SOAK") != "" {
		return 3 * time.Hour
	}
	return 9 * time.Minute
}

// guardPipe leads to this process's guard, which keeps the same list.
var guardPipe struct {
	mu   sync.Mutex
	w    *os.File
	have []string
}

// Main is what TestMain calls in place of m.Run: it runs the tests under a
// guard process, or is that process.
func Main(m *testing.M) int {
	if len(os.Args) == 2 && os.Args[1] == guardArg {
		return guard()
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make loop devices and mount them: run them as root")
		return 1
	}
	r, w, err := os.Pipe()
	if err != nil {
		fmt.Fprintln(os.Stderr, "start guard:", err)
		return 1
	}
	cmd := exec.Command("/proc/self/exe", guardArg)
	cmd.Stdin, cmd.Stderr, cmd.Dir = r, os.Stderr, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "start guard:", err)
		return 1
	}
	r.Close()
	guardPipe.w = w
	code := m.Run()
	w.Close()
	if err := cmd.Wait(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, "guard:", err)
		return 1
	}
	return code
}

func tell(line string) {
	guardPipe.mu.Lock()
	defer guardPipe.mu.Unlock()
	guardPipe.have = note(guardPipe.have, line)
	if guardPipe.w != nil {
		fmt.Fprintln(guardPipe.w, line)
	}
}

// note adds what a line begins with + and removes what it begins with -.
func note(have []string, line string) []string {
	if thing, ok := strings.CutPrefix(line, "+"); ok {
		return append(have, thing)
	}
	if i := slices.Index(have, line[1:]); i >= 0 {
		return slices.Delete(have, i, i+1)
	}
	return have
}

// ThawAll thaws every mount of this test process, so that a test which finds
// something frozen can fail instead of waiting for it.
func ThawAll() {
	guardPipe.mu.Lock()
	defer guardPipe.mu.Unlock()
	thawAll(guardPipe.have)
}

// guard keeps the list of what exists, and undoes it when the tests are gone.
func guard() int {
	signal.Ignore(unix.SIGPIPE) // who read our messages may be gone
	lines := make(chan string)
	go func() {
		defer close(lines)
		for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
			lines <- sc.Text()
		}
	}()
	parent, limit := os.Getppid(), time.After(guardLimit())
	var have []string
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				return undo(have)
			}
			have = note(have, line)
		case <-limit:
			fmt.Fprintln(os.Stderr, "guard: the tests are stuck: thawing")
			thawAll(have)
			_ = unix.Kill(parent, unix.SIGQUIT) // prints where they are
		}
	}
}

// thawAll goes from the oldest mount on: a later one may wait for it.
func thawAll(have []string) {
	for _, thing := range have {
		if dir, ok := strings.CutPrefix(thing, "mount "); ok {
			Thaw(dir)
		}
	}
}

func undo(have []string) int {
	thawAll(have)
	for _, thing := range slices.Backward(have) {
		fmt.Fprintln(os.Stderr, "guard: left behind:", thing)
		kind, name, _ := strings.Cut(thing, " ")
		switch kind {
		case "mount":
			_ = unix.Unmount(name, unix.MNT_DETACH)
		case "loop":
			_ = exec.Command("losetup", "-d", name).Run()
		}
	}
	if len(have) > 0 {
		return 1
	}
	return 0
}
