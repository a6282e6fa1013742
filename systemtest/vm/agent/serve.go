// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/systemtest/vm/wire"
)

// server runs commands for the host.
type server struct {
	conn *wire.Conn

	mu       sync.Mutex
	commands map[uint32]*command
}

// command is one that runs, or ran and has not been reported yet.
type command struct {
	cmd   *exec.Cmd
	stdin chan []byte // nil: end of file
	done  chan struct{}
}

func serve() error {
	port, err := openPort()
	if err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	s := &server{conn: wire.New(port), commands: map[uint32]*command{}}
	if err := s.conn.Send(wire.Message{Kind: wire.Ready, Data: []byte(unix.ByteSliceToString(u.Release[:]))}); err != nil {
		return err
	}
	for {
		m, err := s.conn.Receive()
		if err != nil {
			return err
		}
		s.mu.Lock()
		c := s.commands[m.ID]
		s.mu.Unlock()
		switch m.Kind {
		case wire.Start:
			s.start(m)
		case wire.Stdin:
			if c != nil {
				select {
				case c.stdin <- m.Data:
				case <-c.done:
				}
			}
		case wire.Signal:
			if c != nil {
				_ = c.cmd.Process.Signal(syscall.Signal(m.Code))
			}
		case wire.Dump:
			// What is blocked comes last: the end of the log is what is shown.
			_ = os.WriteFile("/proc/sysrq-trigger", []byte("l"), 0)
			_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
		}
	}
}

// start runs a command and reports what becomes of it.
func (s *server) start(m wire.Message) {
	fail := func(err error) {
		_ = s.conn.Send(wire.Message{Kind: wire.Exit, ID: m.ID, Code: -1, Data: []byte(err.Error())})
	}
	if len(m.Args) == 0 {
		fail(errors.New("no command"))
		return
	}
	cmd := exec.Command(m.Args[0], m.Args[1:]...)
	cmd.Env = append(os.Environ(), m.Env...)
	cmd.Dir = m.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		fail(err)
		return
	}
	// Pipes of our own: a command has ended when it ended, even if something
	// that it left behind holds its output open.
	outR, outW, err := os.Pipe()
	if err != nil {
		fail(err)
		return
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		fail(errors.Join(err, outR.Close(), outW.Close()))
		return
	}
	cmd.Stdout, cmd.Stderr = outW, errW
	err = cmd.Start()
	_ = errors.Join(outW.Close(), errW.Close())
	if err != nil {
		_ = errors.Join(outR.Close(), errR.Close())
		fail(err)
		return
	}
	// Room for as many messages as a full window can be cut into.
	c := &command{cmd: cmd, stdin: make(chan []byte, 64), done: make(chan struct{})}
	s.mu.Lock()
	s.commands[m.ID] = c
	s.mu.Unlock()
	go s.feed(m.ID, c, stdin)
	go s.watch(m.ID, c, outR, errR)
}

// feed hands a command its standard input.
func (s *server) feed(id uint32, c *command, stdin io.WriteCloser) {
	defer stdin.Close()
	for {
		select {
		case data := <-c.stdin:
			if len(data) == 0 {
				return
			}
			if _, err := stdin.Write(data); err != nil {
				// It does not read any more; the rest has nowhere to go.
				_ = stdin.Close()
			}
			if s.conn.Send(wire.Message{Kind: wire.Took, ID: id, Code: len(data)}) != nil {
				return
			}
		case <-c.done:
			return
		}
	}
}

// watch sends a command's output while it comes, and its end.
func (s *server) watch(id uint32, c *command, outR, errR *os.File) {
	var wg sync.WaitGroup
	wg.Go(func() { s.forward(id, wire.Stdout, outR) })
	wg.Go(func() { s.forward(id, wire.Stderr, errR) })
	err := c.cmd.Wait()
	interrupt(outR)
	interrupt(errR)
	wg.Wait()
	close(c.done)
	s.mu.Lock()
	delete(s.commands, id)
	s.mu.Unlock()
	m := wire.Message{Kind: wire.Exit, ID: id, Code: c.cmd.ProcessState.ExitCode()}
	if err != nil {
		m.Data = []byte(err.Error())
	}
	_ = s.conn.Send(m)
}

// forward sends what comes out of f until its end, or, once interrupted, until
// what was in the pipe by then has been sent.
func (s *server) forward(id uint32, kind wire.Kind, f *os.File) {
	defer f.Close()
	buf := make([]byte, 64<<10)
	send := func(n int) bool {
		return n <= 0 || s.conn.Send(wire.Message{Kind: kind, ID: id, Data: buf[:n]}) == nil
	}
	for {
		n, err := f.Read(buf)
		if !send(n) {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return
		}
	}
	raw, err := f.SyscallConn()
	if err != nil || f.SetReadDeadline(time.Time{}) != nil {
		return
	}
	for n := 1; n > 0; {
		// The descriptor does not block; nothing there is an error here, and the end.
		if raw.Read(func(fd uintptr) bool { n, err = unix.Read(int(fd), buf); return true }) != nil || err != nil || !send(n) {
			return
		}
	}
}

// interrupt ends the reader of f, although someone may still hold the other end.
func interrupt(f *os.File) {
	_ = f.SetReadDeadline(time.Now())
}
