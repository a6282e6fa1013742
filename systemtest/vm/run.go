// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/dsync-backup/dsync-backup/systemtest/vm/wire"
)

// Command is something to run in a guest.
type Command struct {
	Args  []string
	Env   []string  // added to the guest's own
	Dir   string    // "/" if empty
	Stdin io.Reader // nil: nothing
	// Output, if not nil, gets standard output and error while they come.
	Output io.Writer
	// Timeout is the machine's if zero.
	Timeout time.Duration
}

// Result is what became of a command.
type Result struct {
	Stdout, Stderr []byte
	// Status is the exit status, or -1 if a signal ended it or it never ran.
	Status int
	Err    error // nil for status 0
}

// Process is a command that runs in a guest.
type Process struct {
	g       *guest
	id      uint32
	args    []string
	timeout time.Duration
	output  io.Writer
	room    chan int // bytes of standard input that the guest took
	done    chan struct{}

	mu             sync.Mutex
	stdout, stderr bytes.Buffer
	result         Result
}

// Run runs a command, which must succeed, and returns its standard output without
// space around it.
func (m *Machine) Run(args ...string) string {
	m.t.Helper()
	r := m.Try(args...)
	if r.Err != nil {
		m.t.Fatalf("in the guest: %s: %v\n%s%s", strings.Join(args, " "), r.Err, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

// Shell runs a script, which must succeed, with the guest's shell, as Run does.
func (m *Machine) Shell(script string) string {
	m.t.Helper()
	return m.Run("sh", "-euc", script)
}

// Try runs a command that may fail.
func (m *Machine) Try(args ...string) Result {
	m.t.Helper()
	return m.Start(Command{Args: args}).Wait()
}

// Start starts a command in the guest.
func (m *Machine) Start(c Command) *Process {
	m.t.Helper()
	g := m.guest
	if g == nil {
		m.t.Fatalf("run %s: the machine is off", strings.Join(c.Args, " "))
	}
	p := &Process{g: g, args: c.Args, timeout: c.Timeout, output: c.Output, room: make(chan int, 64), done: make(chan struct{})}
	if p.timeout == 0 {
		p.timeout = m.config.Timeout
	}
	g.mu.Lock()
	g.last++
	p.id = g.last
	ended := g.ended
	if ended == nil {
		g.processes[p.id] = p
	}
	g.mu.Unlock()
	if ended != nil {
		p.finish(-1, ended)
		return p
	}
	if err := g.conn.Send(wire.Message{Kind: wire.Start, ID: p.id, Args: c.Args, Env: c.Env, Dir: either(c.Dir, "/")}); err != nil {
		g.fail(err)
		return p
	}
	go p.feed(c.Stdin)
	return p
}

// feed sends a command its standard input, no faster than it takes it.
func (p *Process) feed(in io.Reader) {
	room := wire.Window
	buf := make([]byte, 32<<10)
	for in != nil {
		n, err := in.Read(buf)
		if n > 0 && p.g.conn.Send(wire.Message{Kind: wire.Stdin, ID: p.id, Data: buf[:n]}) != nil {
			return
		}
		for room -= n; room < len(buf); {
			select {
			case took := <-p.room:
				room += took
			case <-p.done:
				return
			}
		}
		if err != nil {
			break
		}
	}
	_ = p.g.conn.Send(wire.Message{Kind: wire.Stdin, ID: p.id})
}

// Wait waits for the end of a command. One that takes longer than it may is
// an error, and the kernel's log then shows what tasks are blocked.
func (p *Process) Wait() Result {
	select {
	case <-p.done:
		return p.result
	case <-time.After(p.timeout):
	}
	_ = p.g.conn.Send(wire.Message{Kind: wire.Dump, ID: p.id})
	select {
	case <-p.done: // just late
	case <-time.After(dumpTime):
		p.finish(-1, fmt.Errorf("no end after %v; the kernel's log shows what is blocked", p.timeout))
	}
	return p.result
}

// dumpTime is how long a guest has to log its blocked tasks.
const dumpTime = 5 * time.Second

// Signal sends a command a signal.
func (p *Process) Signal(number int) error {
	return p.g.conn.Send(wire.Message{Kind: wire.Signal, ID: p.id, Code: number})
}

// Output returns what the command has written so far, standard output only.
func (p *Process) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stdout.String()
}

// Done is closed when the command has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

func (p *Process) finish(status int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.done:
		return
	default:
	}
	p.result = Result{Stdout: p.stdout.Bytes(), Stderr: p.stderr.Bytes(), Status: status, Err: err}
	close(p.done)
}

func (p *Process) take(m wire.Message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.done: // given up; its result is out of our hands
		return
	default:
	}
	if p.output != nil {
		_, _ = p.output.Write(m.Data)
	}
	if m.Kind == wire.Stdout {
		p.stdout.Write(m.Data)
	} else {
		p.stderr.Write(m.Data)
	}
}

// listen hands out what the agent says.
func (g *guest) listen(stream io.Closer) {
	defer stream.Close()
	for {
		m, err := g.conn.Receive()
		if err != nil {
			g.fail(fmt.Errorf("the guest is gone: %w", err))
			return
		}
		g.mu.Lock()
		p := g.processes[m.ID]
		g.mu.Unlock()
		if p == nil {
			continue
		}
		switch m.Kind {
		case wire.Stdout, wire.Stderr:
			p.take(m)
		case wire.Took:
			select {
			case p.room <- m.Code:
			case <-p.done:
			}
		case wire.Exit:
			var err error
			if m.Code != 0 {
				err = errors.New(string(m.Data))
			}
			g.mu.Lock()
			delete(g.processes, m.ID)
			g.mu.Unlock()
			p.finish(m.Code, err)
		}
	}
}

// fail ends all that waits for a guest that is gone.
func (g *guest) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended == nil {
		g.ended = err
	}
	for _, p := range g.processes {
		p.finish(-1, g.ended)
	}
}

// Put copies a file of the host into the guest, executable.
func (m *Machine) Put(from, to string) {
	m.t.Helper()
	f, err := os.Open(from)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	m.put(f, to)
}

// Write makes a file in the guest.
func (m *Machine) Write(to, text string) {
	m.t.Helper()
	m.put(strings.NewReader(text), to)
}

func (m *Machine) put(from io.Reader, to string) {
	m.t.Helper()
	if r := m.Start(Command{Args: []string{"/init", "put", to}, Stdin: from}).Wait(); r.Err != nil {
		m.t.Fatalf("write %s in the guest: %v: %s", to, r.Err, r.Stderr)
	}
}

// Read returns the contents of a file in the guest.
func (m *Machine) Read(name string) []byte {
	m.t.Helper()
	r := m.Try("/init", "get", name)
	if r.Err != nil {
		m.t.Fatalf("read %s in the guest: %v: %s", name, r.Err, r.Stderr)
	}
	return r.Stdout
}

// Get copies a file of the guest to the host.
func (m *Machine) Get(from, to string) {
	m.t.Helper()
	if err := os.WriteFile(to, m.Read(from), 0o644); err != nil {
		m.t.Fatal(err)
	}
}
