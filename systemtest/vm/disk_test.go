// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// What a disk was synced with survives a power cut and is there at the next boot;
// what only the guest's memory held is not.
func TestPowerCut(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{
			Tools: []string{"mkfs.ext4"},
			Disks: []Disk{{Name: "other", Size: 1 << 20, ReadOnly: true}, {Name: "data", Size: 64 << 20, Cache: "none"}},
		})
		m.Run("mkfs.ext4", "-q", m.Device("data"))
		m.Shell("mount " + m.Device("data") + " /mnt; echo synced >/mnt/synced; sync; echo lost >/mnt/lost; echo lost >/root/lost")
		if got := m.Run("cat", "/mnt/lost"); got != "lost" {
			t.Fatalf("the guest reads %q", got)
		}
		m.Kill()
		m.Boot()
		m.Run("mount", m.Device("data"), "/mnt")
		if got := m.Run("cat", "/mnt/synced"); got != "synced" {
			t.Errorf("the synced file holds %q", got)
		}
		if r := m.Try("cat", "/mnt/lost"); r.Err == nil && len(r.Stdout) > 0 {
			t.Errorf("a file that was never written out holds %q", r.Stdout)
		}
		if r := m.Try("test", "-e", "/root/lost"); r.Status != 1 {
			t.Errorf("a file in memory: %+v", r)
		}
		if r := m.Try("dd", "if=/dev/zero", "of="+m.Device("other"), "count=1", "conv=fsync"); r.Err == nil {
			t.Error("a disk that is read only can be written")
		}
	})
}

// Files go in and come out as they are, and a command's input, output and end arrive.
func TestCommands(t *testing.T) {
	t.Parallel()
	k, err := Get(table[0])
	if err != nil {
		t.Fatal(err)
	}
	m := Start(t, k, Config{Tools: []string{"restic"}, Backup: true})
	data := make([]byte, 9<<20+17)
	for i, r := 0, rand.New(rand.NewPCG(1, 2)); i < len(data); i++ {
		data[i] = byte(r.Uint32())
	}
	in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(in, data, 0o644); err != nil {
		t.Fatal(err)
	}
	m.Put(in, "/tmp/a folder/file")
	if got := m.Run("sha256sum", "/tmp/a folder/file"); got[:64] != fmt.Sprintf("%x", sha256.Sum256(data)) {
		t.Errorf("the guest has %s", got)
	}
	m.Get("/tmp/a folder/file", out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back as %d, other ones: %v", len(data), len(got), err)
	}
	// One that never reads its input is not in the way of others.
	deaf := m.Start(Command{Args: []string{"sleep", "1000"}, Stdin: bytes.NewReader(data)})
	if r := m.Try("sh", "-c", "echo out; echo err >&2; exit 7"); r.Status != 7 || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.Err == nil {
		t.Errorf("exit 7: %+v", r)
	}
	if r := m.Try("no-such-command"); r.Status != -1 || r.Err == nil {
		t.Errorf("a command that is not there: %+v", r)
	}
	if err := deaf.Signal(15); err != nil {
		t.Error(err)
	}
	if r := deaf.Wait(); r.Status != -1 || r.Err == nil {
		t.Errorf("ended by a signal: %+v", r)
	}
	// One that leaves something behind with its output has ended all the same.
	if got := m.Shell("sleep 1000 & echo left"); got != "left" {
		t.Errorf("got %q", got)
	}
	m.Run("dsync-backup", "--help")
	m.Run("restic", "version")
}
