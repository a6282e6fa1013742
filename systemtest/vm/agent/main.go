// SPDX-License-Identifier: BSD-2-Clause

// Command agent is the first process of a guest: it mounts what a Linux system
// has mounted, loads the modules that the scenario names, and then runs what
// the host sends over virtio-serial.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/systemtest/vm/wire"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 3:
		err = files(os.Args[1], os.Args[2])
	case len(os.Args) == 2 && os.Args[1] == "serve":
		err = serve()
	case os.Getpid() == 1:
		err = first()
		fmt.Fprintln(os.Stderr, "agent:", err)
		unix.Sync()
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	default:
		err = errors.New("usage: agent put|get FILE, or as the first process of a guest")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// first is the life of process 1: it makes the system ready, starts the process
// that serves the host, and from then on buries what others leave behind, as
// an init must. It returns when there is nothing left to serve.
func first() error {
	if err := prepare(); err != nil {
		return err
	}
	p, err := os.StartProcess("/proc/self/exe", []string{"agent", "serve"},
		&os.ProcAttr{Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if pid == p.Pid {
			return fmt.Errorf("the serving process ended: status %#x", uint32(status))
		}
	}
}

// files is what Machine.Put and Machine.Get run.
func files(verb, name string) error {
	switch verb {
	case "put":
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		tmp := name + ".part"
		f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, os.Stdin)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		return os.Rename(tmp, name)
	case "get":
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(os.Stdout, f)
		return err
	}
	return fmt.Errorf("agent: no such verb: %s", verb)
}

type mount struct{ kind, dir, options string }

var mounts = []mount{
	{"proc", "/proc", ""},
	{"sysfs", "/sys", ""},
	{"devtmpfs", "/dev", ""},
	{"devpts", "/dev/pts", ""},
	{"tmpfs", "/dev/shm", ""},
	{"tmpfs", "/run", ""},
	{"tmpfs", "/tmp", ""},
	{"debugfs", "/sys/kernel/debug", ""},
	{"tracefs", "/sys/kernel/tracing", ""},
	{"bpf", "/sys/fs/bpf", ""},
	{"cgroup2", "/sys/fs/cgroup", ""},
}

func prepare() error {
	for _, m := range mounts {
		_ = os.MkdirAll(m.dir, 0o755)
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.dir, err)
		}
	}
	if err := os.Chmod("/tmp", 0o1777); err != nil {
		return err
	}
	for link, to := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2"} {
		if err := os.Symlink(to, link); err != nil {
			return err
		}
	}
	if err := os.Symlink("/proc/mounts", "/etc/mtab"); err != nil {
		return err
	}
	for _, kv := range []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TMPDIR=/tmp"} {
		k, v, _ := strings.Cut(kv, "=")
		if err := os.Setenv(k, v); err != nil {
			return err
		}
	}
	if err := loopback(); err != nil {
		return fmt.Errorf("bring up the loopback device: %w", err)
	}
	return loadModules("/etc/modules-load")
}

func loopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// loadModules loads the files that a list names, one a line, in its order.
func loadModules(list string) error {
	f, err := os.Open(list)
	if err != nil {
		return err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		path, params, _ := strings.Cut(s.Text(), " ")
		m, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(m.Fd()), params, 0)
		m.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	return nil
}

// openPort waits for the virtio-serial port of the harness.
func openPort() (*os.File, error) {
	for range 1000 {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(b)) == wire.Port {
				return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(n))), os.O_RDWR, 0)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, errors.New("there is no virtio-serial port " + wire.Port)
}
