// SPDX-License-Identifier: BSD-2-Clause

package host

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRunMeasuresWhatTheCommandAndItsChildrenUse(t *testing.T) {
	c, err := Run(context.Background(), Command{Args: []string{"sh", "-c", `sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'; echo $X`}, Env: []string{"X=y"}})
	if err != nil {
		t.Fatal(err)
	}
	if c.CPU <= 0 || c.Seconds <= 0 || c.CPU > c.Seconds*4 || c.Memory < 100<<10 || string(c.Stdout) != "y\n" {
		t.Errorf("%+v", c)
	}
}

// What this process had before does not count as the command's.
func TestMemoryIsTheCommandsOwn(t *testing.T) {
	big := make([]byte, 300<<20)
	for i := range big {
		big[i] = byte(i)
	}
	t.Log(len(big))
	big = nil
	c, err := Run(context.Background(), Command{Args: []string{"true"}})
	if err != nil || c.Memory > 100<<20 || c.Memory <= 0 {
		t.Errorf("%d bytes, %v", c.Memory, err)
	}
	if f := Floor(); f <= 0 || f > 100<<20 {
		t.Errorf("floor: %d", f)
	}
}

// Waiting for the disk leaves nothing behind, and what goes wrong is told.
func TestAwaitRest(t *testing.T) {
	dir := t.TempDir()
	if _, err := AwaitRest(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Error(left, err)
	}
	if _, err := AwaitRest(t.Context(), filepath.Join(dir, "missing")); err == nil {
		t.Error("a folder that is not there has come to rest")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if rested, err := AwaitRest(ctx, dir); rested || err == nil {
		t.Error(rested, err)
	}
}

func TestAFailedCommandSaysWhatItPrinted(t *testing.T) {
	_, err := Run(context.Background(), Command{Args: []string{"sh", "-c", "echo because >&2; exit 3"}})
	if err == nil || !strings.Contains(err.Error(), "because") {
		t.Error(err)
	}
}

func TestDiskCountsWhatIsReadOfIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("run it as root: it makes a loop device")
	}
	d, err := NewDisk(context.Background(), filepath.Join(t.TempDir(), "d"), 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	before, err := d.BytesRead()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Output(context.Background(), "dd", "if="+d.Path, "of=/dev/null", "iflag=direct", "bs=1M", "count=3"); err != nil {
		t.Fatal(err)
	}
	if after, err := d.BytesRead(); err != nil || after-before != 3<<20 {
		t.Errorf("%d bytes were read, %v", after-before, err)
	}
}

func TestSizeAddsUpFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b/c"} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, make([]byte, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := Size(dir); err != nil || n != 2000 {
		t.Errorf("%d, %v", n, err)
	}
}

func TestDescribeKnowsTheMachine(t *testing.T) {
	for _, d := range Describe() {
		if d[1] == "" || d[1] == "unknown" {
			t.Errorf("%s: %q", d[0], d[1])
		}
	}
}
