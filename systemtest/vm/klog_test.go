// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// boot is the kernel's log without a fault, with lines that look like one.
const healthy = `[    0.000000] Linux version 6.1.0 (gcc-12)
[    0.000000] random: crng init done
[    0.412345] clocksource: tsc-early: mask: 0xffffffffffffffff max_cycles: 0x1cd42e4dffb, max_idle_ns: 881590591483 ns
[    1.000000] device-mapper: core: CONFIG_IMA_DISABLE_HTABLE is disabled. Duplicate IMA measurements will not be recorded in the IMA log.
[    2.000000] dm_dsync: loading out-of-tree module taints kernel.
[    2.000000] dm_dsync: module verification failed: signature and/or required key missing - tainting kernel
[    3.000000] EXT4-fs (vda): mounted filesystem with ordered data mode. Quota mode: none.
[    3.100000] Buffer I/O error on dev dm-0, logical block 0, lost async page write
[    3.200000] debug: warning about nothing
`

func TestFaults(t *testing.T) {
	if got := Faults(healthy); got != "" {
		t.Errorf("a healthy log has faults:\n%s", got)
	}
	for _, line := range []string{
		"WARNING: CPU: 0 PID: 1 at drivers/md/dm.c:17 dm_x+0x1/0x2",
		"WARNING: possible recursive locking detected",
		"WARNING: possible circular locking dependency detected",
		"WARNING: suspicious RCU usage",
		"BUG: unable to handle page fault for address: ffff",
		"BUG: kernel NULL pointer dereference, address: 0000000000000008",
		"BUG: KASAN: slab-use-after-free in dsync_map+0x1/0x2",
		"BUG: sleeping function called from invalid context at mm/page_alloc.c:1",
		"BUG: scheduling while atomic: fio/17/0x00000002",
		"kernel BUG at mm/slub.c:1!",
		"invalid opcode: 0000 [#1] PREEMPT SMP",
		"Oops: 0000 [#1] PREEMPT SMP",
		"general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1]",
		"kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
		"unreferenced object 0xffff8881 (size 64):",
		"BUG dsync_cache (Not tainted): Objects remaining in dsync_cache on __kmem_cache_shutdown()",
		"unregister_netdevice: waiting for lo to become free. Usage count = 1",
		"INFO: task dmsetup:12 blocked for more than 120 seconds.",
		"rcu: INFO: rcu_preempt self-detected stall on CPU",
		"watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [x:1]",
		"refcount_t: underflow; use-after-free.",
		"list_del corruption. next->prev should be x",
		"fio: page allocation failure: order:4, mode:0x40cc0",
		"fio invoked oom-killer: gfp_mask=0x1, order=0",
		"UBSAN: shift-out-of-bounds in drivers/md/x.c:1:2",
		"Kernel panic - not syncing: sysrq triggered crash",
		"dsync-backup[77]: segfault at 0 ip 0 sp 0 error 4",
		"EXT4-fs error (device vda): ext4_lookup:1: inode #2: comm ls: deleted inode referenced: 3",
	} {
		log := strings.ReplaceAll(healthy, "[    2.000000]", "[    2.000000] "+line+"\n[    2.000000]")
		got := Faults(log)
		if !strings.Contains(got, line) || !strings.Contains(got, "EXT4-fs (vda)") {
			t.Errorf("%s\nis found as\n%q", line, got)
		}
		if got := Faults(log, Allow{regexp.MustCompile(regexp.QuoteMeta(line)), "the test"}); got != "" {
			t.Errorf("%s\nis allowed, and found as\n%q", line, got)
		}
	}
}

// A fault in a guest is found in the log that the guest wrote, whether it lives on or
// not. The machines are not given to the end of a test, which would fail it.
func TestFaultsOfGuests(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{Allow: []Allow{{regexp.MustCompile(`made up by a test|Kernel panic`), "this test looks by itself"}}})
		logged := func() string {
			b, err := os.ReadFile(m.log)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		if got := Faults(m.Log()); got != "" {
			t.Fatalf("a guest that did nothing has faults:\n%s", got)
		}
		m.Shell(`echo "<4>WARNING: CPU: 0 PID: 1 at made up by a test" >/dev/kmsg`)
		if got := Faults(logged()); !strings.Contains(got, "made up by a test") {
			t.Errorf("a warning is found as %q", got)
		}
		log := m.log
		crash := m.Start(Command{Args: []string{"sh", "-c", "echo c >/proc/sysrq-trigger"}})
		m.AwaitDeath()
		if r := crash.Wait(); r.Err == nil {
			t.Errorf("the command that crashed the guest: %+v", r)
		}
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		if got := Faults(string(b)); !strings.Contains(got, "Kernel panic - not syncing: sysrq triggered crash") {
			t.Errorf("a panic is found as %q", got)
		}
		m.Boot()
		m.Run("true")
	})
}
