// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"sync"
	"time"

	"github.com/dsync-backup/dsync-backup/systemtest/vm/wire"
)

// Memory is what a guest was at a moment, its disks included.
type Memory struct {
	file  string            // QEMU's stream of migration
	disks map[string]string // copies of the disks' files, by name
	conn  *wire.Conn
	raw   *stream
	last  uint32
	tests map[string]bool
}

// stream is the agent's stream, which another QEMU takes over when a guest is
// reverted: both ends go on where they were.
type stream struct {
	mu   sync.Mutex
	conn net.Conn
}

func (s *stream) current() net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn
}

func (s *stream) Read(p []byte) (int, error)  { return s.current().Read(p) }
func (s *stream) Write(p []byte) (int, error) { return s.current().Write(p) }

// SaveMemory saves the guest's memory and copies its disks, while it stands still. No
// command may be running in it. It needs Config.Monitor.
func (m *Machine) SaveMemory() *Memory {
	m.t.Helper()
	saved := &Memory{
		file: m.file(fmt.Sprintf("memory-%d", m.boots)), disks: map[string]string{},
		conn: m.conn, raw: m.guest.stream, last: m.last, tests: m.tests,
	}
	if err := m.saveMemory(saved); err != nil {
		m.t.Fatalf("save the guest's memory: %v", err)
	}
	return saved
}

func (m *Machine) saveMemory(saved *Memory) error {
	if _, err := m.command("stop", nil); err != nil {
		return err
	}
	if _, err := m.command("migrate", map[string]any{"uri": "exec:cat >" + saved.file}); err != nil {
		return err
	}
	for end := time.Now().Add(bootTime); ; time.Sleep(20 * time.Millisecond) {
		answer, err := m.command("query-migrate", nil)
		if err != nil {
			return err
		}
		var state struct {
			Status string
			Reason string `json:"error-desc"`
		}
		if err := json.Unmarshal(answer, &state); err != nil {
			return err
		}
		if state.Status == "completed" {
			break
		}
		if state.Status == "failed" || time.Now().After(end) {
			return fmt.Errorf("migration: %s %s", state.Status, state.Reason)
		}
	}
	for _, d := range m.config.Disks {
		copied := m.DiskFile(d.Name) + fmt.Sprintf(".%d", m.boots)
		if out, err := exec.Command("cp", "--sparse=always", m.DiskFile(d.Name), copied).CombinedOutput(); err != nil {
			return fmt.Errorf("cp: %w: %s", err, out)
		}
		saved.disks[d.Name] = copied
	}
	_, err := m.command("cont", nil)
	return err
}

// Revert takes the machine, whether on or off, back to a saved memory, and those disks
// that are named to what they were then. The others stay what they are. A memory can be reverted to once.
func (m *Machine) Revert(saved *Memory, disks ...string) {
	m.t.Helper()
	if m.guest != nil {
		m.Kill()
	}
	for _, name := range disks {
		if out, err := exec.Command("cp", "--sparse=always", saved.disks[name], m.DiskFile(name)).CombinedOutput(); err != nil {
			m.t.Fatalf("cp: %v: %s", err, out)
		}
	}
	m.boots++
	g, err := m.boot(saved)
	if err != nil {
		m.t.Fatalf("revert the guest: %v", err)
	}
	m.guest = g
}

// goOn lets a guest run that was loaded from a saved memory.
func (g *guest) goOn(saved *Memory, port net.Conn) error {
	g.conn, g.stream, g.last, g.tests = saved.conn, saved.raw, saved.last, saved.tests
	g.stream.mu.Lock()
	g.stream.conn = port
	g.stream.mu.Unlock()
	for end := time.Now().Add(bootTime); ; time.Sleep(20 * time.Millisecond) {
		answer, err := g.command("query-status", nil)
		if err != nil {
			return err
		}
		var state struct{ Status string }
		if err := json.Unmarshal(answer, &state); err != nil {
			return err
		}
		if state.Status == "paused" || state.Status == "running" {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("the saved memory is not loaded: %s", state.Status)
		}
	}
	if _, err := g.command("cont", nil); err != nil {
		return err
	}
	go g.listen(port)
	return nil
}

// openMonitor waits for QEMU's monitor, and makes it ready for commands.
func openMonitor(l *net.UnixListener) (*monitor, error) {
	if err := l.SetDeadline(time.Now().Add(bootTime)); err != nil {
		return nil, err
	}
	c, err := l.Accept()
	if err != nil {
		return nil, fmt.Errorf("QEMU's monitor: %w", err)
	}
	g := &guest{monitor: &monitor{c, bufio.NewReader(c)}}
	if _, err := g.command("qmp_capabilities", nil); err != nil {
		return nil, err
	}
	return g.monitor, nil
}

// monitor is the connection to QEMU's.
type monitor struct {
	net.Conn
	lines *bufio.Reader
}

// command runs a command of QEMU's monitor. It ignores the greeting and events.
func (g *guest) command(name string, arguments map[string]any) (json.RawMessage, error) {
	if g.monitor == nil {
		return nil, errors.New("the machine has no monitor: set Config.Monitor")
	}
	request := map[string]any{"execute": name}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(g.monitor).Encode(request); err != nil {
		return nil, fmt.Errorf("QEMU's monitor: %w", err)
	}
	if err := g.monitor.SetReadDeadline(time.Now().Add(bootTime)); err != nil {
		return nil, err
	}
	for {
		line, err := g.monitor.lines.ReadBytes('\n')
		if err != nil {
			return nil, fmt.Errorf("QEMU's monitor: %s: %w", name, err)
		}
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return nil, fmt.Errorf("QEMU's monitor: %q: %w", line, err)
		}
		if answer.Error != nil {
			return nil, fmt.Errorf("QEMU's monitor: %s: %s", name, answer.Error.Desc)
		}
		if answer.Return != nil {
			return answer.Return, nil
		}
	}
}
