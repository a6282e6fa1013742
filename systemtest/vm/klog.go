// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// fault matches lines that a healthy kernel does not log.
var fault = regexp.MustCompile(strings.Join([]string{
	`\bWARNING: `, // WARN_ON, and lockdep's "possible recursive locking detected"
	`\bBUG: `, `\bkernel BUG at `, `\bOops\b`, `Kernel panic`,
	`general protection fault`, `unable to handle`, `Unable to handle`, `divide error`, `invalid opcode`, `double fault`,
	`possible (recursive|circular) locking`, `possible irq lock inversion`, `inconsistent lock state`, `bad unlock balance`,
	`suspicious RCU usage`, `[Ii]llegal context switch in RCU`, `held lock freed`, `lock held when returning to user space`,
	`\b(KASAN|KCSAN|KMSAN|KFENCE|UBSAN): `, `kmemleak: `, `unreferenced object 0x`,
	`refcount_t: `, `list_(add|del) corruption`, `sleeping function called from`, `scheduling while atomic`,
	`unregister_netdevice: waiting`, `INFO: task .* blocked for more than`, `INFO: rcu`, `rcu: INFO`, `self-detected stall`, `detected stalls`,
	`soft lockup`, `hard LOCKUP`, `Bad page (state|map)`, `page allocation failure`, `Objects remaining in`, `still has objects`,
	`stack-protector: `, `stack guard page`, `corrupted stack end`, `nobody cared`, `DEBUG_LOCKS_WARN_ON`, `workqueue lockup`,
	`ODEBUG: `, `invoked oom-killer`, `Out of memory: `, `\bsegfault at `, `traps: .* trap`,
	`disagrees about version of symbol`, `Unknown symbol`, `Unpacking initramfs failed`, `Initramfs unpacking failed`,
	`EXT4-fs error`, `XFS .*(Corruption|Internal error|corruption)`, `BTRFS.*(critical|error)`, `^agent: `,
}, "|"))

// harmless are lines that match and are no faults in any scenario.
var harmless = []Allow{
	{regexp.MustCompile(`unable to handle .*\bSMBIOS\b`), "firmware of an emulated machine"},
}

// Faults returns the lines of a kernel's log that tell of a fault, each with the lines
// after it that explain it. "" is a healthy log.
func Faults(log string, allow ...Allow) string {
	lines := strings.Split(strings.ReplaceAll(log, "\r", ""), "\n")
	var out strings.Builder
	shown := 0 // lines before this one are in out
	for i, line := range lines {
		if !fault.MatchString(line) || allowed(line, harmless) || allowed(line, allow) {
			continue
		}
		to := min(i+excerpt, len(lines))
		for j := max(shown, i-2); j < to; j++ {
			out.WriteString(lines[j] + "\n")
		}
		shown = max(shown, to)
	}
	return out.String()
}

// excerpt is how many lines are shown from a fault on.
const excerpt = 30

func allowed(line string, allow []Allow) bool {
	for _, a := range allow {
		if a.Line.MatchString(line) {
			return true
		}
	}
	return false
}

// Log returns what the kernel of the running guest has logged so far.
func (m *Machine) Log() string {
	m.t.Helper()
	if m.guest == nil {
		m.t.Fatal("log: the machine is off")
	}
	b, err := os.ReadFile(m.log)
	if err != nil {
		m.t.Fatal(err)
	}
	return string(b)
}

func (m *Machine) faults(log string) (string, error) {
	b, err := os.ReadFile(log)
	if err != nil {
		return "", fmt.Errorf("read the kernel's log: %w", err)
	}
	return Faults(string(b), m.config.Allow...), nil
}

// tail returns the end of a kernel's log, and says where the whole of it is kept.
func (m *Machine) tail(log string) string {
	b, err := os.ReadFile(log)
	if err != nil {
		return err.Error()
	}
	where := log
	if root, err := Root(); err == nil {
		// The test's own folder goes with the test.
		name := strings.NewReplacer("/", "_", " ", "_").Replace(m.t.Name()) + "-" + filepath.Base(log)
		kept := filepath.Join(root, ".build/vm-logs", name)
		if os.MkdirAll(filepath.Dir(kept), 0o755) == nil && os.WriteFile(kept, b, 0o644) == nil {
			where = kept
		}
	}
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(b), "\r", "")), "\n")
	if n := len(lines); n > tailLines {
		lines = lines[n-tailLines:]
	}
	return fmt.Sprintf("the kernel's log is %s; it ends with:\n%s", where, strings.Join(lines, "\n"))
}

const tailLines = 40
