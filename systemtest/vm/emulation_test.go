// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"os"
	"strings"
	"testing"
)

// lost is what 6.12 logs of a break point that QEMU ran when it was gone; 6.1 begins with
// "int3:".
const lost = `Oops: int3: 0000 [#1] PREEMPT SMP NOPTI
CPU: 1 UID: 0 PID: 363 Comm: kworker/u8:7 Not tainted 6.12.95+deb12-cloud-amd64
RIP: 0010:blk_mq_start_request+0x16/0x1a0
Code: f3 0f 1e fa 0f 1f 44 00 00 41 55 41 54 55 53 48 89 fb 48 8b 2f 0f <1f> 44 00 00 48 8b 45 20 84 c0
Kernel panic - not syncing: Fatal exception in interrupt`

func TestLostBreakPoint(t *testing.T) {
	stamp := func(lines string) string { return "[    4.0] " + strings.ReplaceAll(lines, "\n", "\n[    4.1] ") }
	for name, c := range map[string]struct {
		log  string
		want bool
	}{
		"6.12":              {healthy + stamp(lost), true},
		"6.1":               {healthy + stamp(strings.TrimPrefix(lost, "Oops: ")), true},
		"carriage returns":  {strings.ReplaceAll(healthy+stamp(lost), "\n", "\r\n"), true},
		"one that is there": {healthy + stamp(strings.Replace(lost, "2f 0f <1f>", "2f cc <1f>", 1)), false},
		"no code":           {healthy + stamp(strings.Replace(lost, "Code:", "", 1)), false},
		"a fault before it": {healthy + stamp("WARNING: CPU: 0 PID: 2 at first\n"+lost), false},
		"another fault":     {healthy + stamp(strings.Replace(lost, "int3: ", "", 1)), false},
		"healthy":           {healthy, false},
	} {
		if got := lostBreakPoint([]byte(c.log)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// Tests whose guest dies of a lost break point run once more, in a guest of their own; what
// else ends a guest fails them (TestFailuresAreFailures).
func TestTestsRunAgainAfterALostBreakPoint(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{Disks: []Disk{{Name: "mark", Size: 1 << 20}}})
		m.GoTest(samplePackage, Tests{
			Run: "TestPasses|TestDiesOnce", Env: []string{"SAMPLE_DISK=" + m.Device("mark"), "SAMPLE_LOG=" + lost},
		})
		b, err := os.ReadFile(m.DiskFile("mark"))
		if err != nil || b[0] != 1 {
			t.Errorf("the guest did not die: %v", err)
		}
		if m.boots != 2 {
			t.Errorf("the machine was booted %d times", m.boots)
		}
	})
}
