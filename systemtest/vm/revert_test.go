// SPDX-License-Identifier: BSD-2-Clause

package vm

import "testing"

// A guest that is taken back to a saved memory goes on from there, with the disks that
// were taken back too, and answers.
func TestMemoryIsReverted(t *testing.T) {
	k, err := Get(table[0])
	if err != nil {
		t.Fatal(err)
	}
	m := Start(t, k, Config{Monitor: true, Disks: []Disk{{Name: "back", Size: 1 << 20}, {Name: "stays", Size: 1 << 20}}})
	write := func(text string) {
		m.Shell("echo " + text + " >/run/file; for d in a b; do echo " + text + " | dd of=/dev/vd$d conv=fsync 2>/dev/null; done")
	}
	write("before")
	saved := m.SaveMemory()
	write("after")
	if got := m.Shell("cat /run/file"); got != "after" {
		t.Fatalf("after it was saved: %q", got)
	}
	m.Revert(saved, "back")
	got := m.Shell("echo 1 >/proc/sys/vm/drop_caches; cat /run/file; head -n 1 /dev/vda; head -n 1 /dev/vdb")
	if got != "before\nbefore\nafter" {
		t.Errorf("reverted: %q", got)
	}
}
