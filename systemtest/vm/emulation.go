// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"time"
)

// brokenEmulation reports whether a boot failed for no fault of its kernel: QEMU itself
// crashed, or the kernel died or stood still before it ran the agent, and with it anything of
// ours, or it died of a lost break point later; and sometimes a processor never hears of what
// another has for it.
func (m *Machine) brokenEmulation() bool {
	if m.crashed {
		return true
	}
	b, err := os.ReadFile(m.file(fmt.Sprintf("kernel-%d.log", m.boots)))
	return os.IsNotExist(err) || err == nil && (!ranInit(b) || lostBreakPoint(b, m.config.Allow...))
}

// ranInit reports whether a kernel's log says that it came to its first program.
func ranInit(log []byte) bool { return bytes.Contains(log, []byte("Run /init as init process")) }

// diedOfEmulation waits for the end of a guest whose agent is silent, and reports whether a
// lost break point ended it. If so, the machine is off, and may be booted again.
func (m *Machine) diedOfEmulation() bool {
	select {
	case <-m.dead:
	case <-time.After(dumpTime):
		return false
	}
	b, err := os.ReadFile(m.log)
	if err != nil || !lostBreakPoint(b, m.config.Allow...) {
		return false
	}
	m.guest = nil
	return true
}

var (
	trapped = regexp.MustCompile(`(?m)^.*\bint3: 0000 \[#1\]`)
	code    = regexp.MustCompile(`\bCode: .*\b([0-9a-f]{2}) <[0-9a-f]{2}>`)
)

// lostBreakPoint reports whether the first fault in a kernel's log is a trap of a break point
// that is not in its text. A kernel replaces instructions of its text under a break point, for
// each tracepoint that is switched, and waits for all processors before it forgets it. QEMU 7.2
// translates what it reads while another processor writes it, and may run such a break point
// when it is gone, which no hardware does. In the instructions that the kernel shows, a real
// one, 0xcc, is the byte before the marked one.
func lostBreakPoint(log []byte, allow ...Allow) bool {
	at := trapped.FindIndex(log)
	if at == nil || Faults(string(log[:at[0]]), allow...) != "" {
		return false
	}
	shown := code.FindSubmatch(log[at[1]:])
	return shown != nil && string(shown[1]) != "cc"
}
