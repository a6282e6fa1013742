// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// transport is what the agent's channel and the disks need, built in or not.
var transport = []string{"virtio_pci", "virtio_blk", "virtio_console"}

// writeInitramfs writes the guest's root file system to the file name, with work as
// a folder for what it is made from.
func writeInitramfs(name, work string, k Kernel, c Config) error {
	t := tree{}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "mnt", "root", "etc", "var/tmp", "var/lib", "usr/bin", "usr/lib", "usr/lib64"} {
		t.dir(dir)
	}
	for link, to := range map[string]string{"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/sbin": "bin", "var/run": "../run"} {
		t.link(link, to)
	}
	t.write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	t.write("etc/group", "root:x:0:\n")
	t.write("etc/hosts", "127.0.0.1 localhost\n")
	t.write("etc/machine-id", "0123456789abcdef0123456789abcdef\n")

	list, err := t.addModules(k, work, slices.Concat(transport, c.Modules), c.Loadable)
	if err != nil {
		return err
	}
	t.write("etc/modules-load", list)
	for _, tool := range c.Tools {
		if err := t.addTool(tool); err != nil {
			return err
		}
	}
	if err := t.addBusybox(); err != nil {
		return err
	}
	agent, err := buildProgram("./systemtest/vm/agent")
	if err != nil {
		return err
	}
	t.copyFile("init", agent)
	if c.Backup {
		program, err := buildProgram("./cmd/dsync-backup")
		if err != nil {
			return err
		}
		t.copyFile("usr/bin/dsync-backup", program)
	}
	for _, to := range slices.Sorted(maps.Keys(c.Files)) {
		t.copyFile(strings.TrimPrefix(to, "/"), c.Files[to])
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(t.archive(f), f.Close())
}

var building sync.Mutex

// buildProgram builds a command of the project and returns its path. It stays, so that
// go does not link it again for the next guest.
func buildProgram(pkg string) (string, error) {
	building.Lock()
	defer building.Unlock()
	root, err := Root()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, ".build/vm-programs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	program := filepath.Join(dir, filepath.Base(pkg))
	return program, goBuild(program, "build", pkg)
}

// goBuild runs go build or go test for a package of the project. What comes out
// needs no libraries.
func goBuild(out string, verb, pkg string, args ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	args = append([]string{verb, "-buildvcs=false", "-o", out}, args...)
	cmd := exec.Command("tools/static", append(args, pkg)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s %s: %w\n%s", verb, pkg, err, out)
	}
	return nil
}
