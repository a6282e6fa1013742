// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"fmt"
	"strings"
	"testing"
)

// TestWornBlobsThatCannotBeReadStayWhereTheyAre has the device fail where what is left of
// worn blobs lies: the backup, which needs none of it, is made, says so, and gives what
// the device held.
func TestWornBlobsThatCannotBeReadStayWhereTheyAre(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		s := newScene(t, k, "dm")
		const sectors, bad, length = sceneSize / 512, (9<<20 - 128<<10) / 512, 256
		disk, saved := s.Device("data"), s.Device("lvm")
		table := func(middle string) string {
			end := bad + length
			return fmt.Sprintf(`printf '0 %d linear %s 0\n%d %d %s\n%d %d linear %s %d\n'`, bad, disk, bad, length, middle, end, sectors-end, disk, end)
		}
		swap := func(middle string) {
			s.Shell(table(middle) + " | dmsetup load low; dmsetup resume low")
		}
		whole := fmt.Sprintf("linear %s %d", disk, bad)
		s.Shell(table(whole) + " | DM_DISABLE_UDEV=1 dmsetup create low")
		s.begin("/dev/mapper/low", "/dev/scene")
		s.Shell("dd if=/dev/urandom of=" + s.device() + " bs=1M seek=3 count=12 conv=fsync 2>/dev/null")
		s.backup()
		// Seven eighths of each MiB.
		s.Shell("for i in 4 5 6 7 8 9 10 11 12 13; do dd if=/dev/urandom of=" + s.device() +
			" bs=128k seek=$((i*8)) count=7 conv=fsync 2>/dev/null; done; echo 3 >/proc/sys/vm/drop_caches; dd if=" + s.device() + " of=" + saved + " bs=1M conv=fsync 2>/dev/null")
		swap("error")
		r := s.Try(s.in("--json", "backup", s.device(), "--name", s.name, "--spot-check", "0")...)
		if r.Err != nil || !strings.Contains(string(r.Stderr), "space in worn blobs is not freed") || !strings.Contains(string(r.Stdout), `"copied_forward_bytes":0,`) {
			t.Errorf("with bad blocks: %v: %s%s", r.Err, r.Stdout, r.Stderr)
		}
		swap(whole)
		s.Run(s.in("restore", "latest", s.Device("target"), "--force")...)
		s.Shell(fmt.Sprintf("cmp -n %d %s %s", sceneSize, saved, s.Device("target")))
		s.Shell("dd if=/dev/urandom of=" + s.device() + " bs=1M seek=14 count=2 conv=fsync 2>/dev/null")
		if sum := s.round(); sum.CopiedForwardBytes == 0 || sum.Changes != "tracker" {
			t.Errorf("when it can be read again: %+v", sum)
		}
	})
}
