// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// systemd understands the unit, its command has the flags, and a mount that waits for it
// as docs/reboots.md says comes between it and nothing that waits for the mount.
func TestTheSystemdUnitIsRight(t *testing.T) {
	dir := t.TempDir()
	text, err := os.ReadFile(filepath.Join(moduleDir, "packaging/systemd/dsync-backup-track@.service"))
	if err != nil {
		t.Fatal(err)
	}
	unit := strings.ReplaceAll(string(text), "/usr/local/sbin/dsync-backup", dsync)
	for _, verb := range []string{"start", "stop"} {
		line := "Exec" + strings.ToUpper(verb[:1]) + verb[1:] + "="
		_, rest, ok := strings.Cut(unit, line)
		if !ok {
			t.Fatalf("the unit has no %s", line)
		}
		command, _, _ := strings.Cut(rest, "\n")
		command = strings.NewReplacer("$TRACK_OPTIONS ", "", "%f", "/dev/null").Replace(command)
		r := finish(t, exec.Command("sh", "-c", command))
		if r.code != 1 || !strings.Contains(r.stderr, "/dev/null") || strings.Contains(r.stderr, "unknown") {
			t.Errorf("%s: %+v", command, r)
		}
	}
	name := "dsync-backup-track@" + run(t, "systemd-escape", "--path", "/dev/disk/by-uuid/5f0c1b1e-7e6f-4a0c-8a54-bb4c4f9d6a3e") + ".service"
	files := map[string]string{
		name:        unit,
		"srv.mount": "[Unit]\nAfter=" + name + "\nBefore=local-fs.target\n[Mount]\nWhat=/dev/disk/by-uuid/5f0c1b1e-7e6f-4a0c-8a54-bb4c4f9d6a3e\nWhere=/srv\n",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", filepath.Join(dir, name), filepath.Join(dir, "srv.mount")).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}
