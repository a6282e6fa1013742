// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// lookTool finds a command of the host, also where only root looks.
func lookTool(name string) (string, error) {
	if strings.Contains(name, "/") {
		return filepath.Abs(name)
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed: run tools/install test as root, or install its package", name)
}

var library = regexp.MustCompile(`(?m)^\s+(?:\S+ => )?(/\S+) \(0x`)

// addTool takes a command of the host with its libraries into t, as /usr/bin/NAME.
func (t tree) addTool(name string) error {
	path, err := lookTool(name)
	if err != nil {
		return err
	}
	base := filepath.Base(name)
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	if is := filepath.Base(real); is != base {
		// A program that goes by its name, as lvm does, keeps the name.
		t.link("usr/bin/"+base, is)
		base = is
	}
	t.copyFile("usr/bin/"+base, real)
	if base == "lvm" {
		t.write("etc/lvm/lvm.conf", lvmConf)
	}
	out, err := exec.Command("ldd", real).CombinedOutput()
	if err != nil {
		if strings.Contains(string(out), "not a dynamic executable") {
			return nil
		}
		return fmt.Errorf("ldd %s: %w: %s", real, err, out)
	}
	for _, m := range library.FindAllStringSubmatch(string(out), -1) {
		// The folders /lib, /lib64 and /usr/lib are one, as in Debian.
		file := strings.TrimPrefix(strings.TrimPrefix(m[1], "/"), "usr/")
		real, err := filepath.EvalSymlinks(m[1])
		if err != nil {
			return err
		}
		t.copyFile("usr/"+file, real)
	}
	return nil
}

// lvmConf is an LVM without udev, daemons and files that outlive it.
const lvmConf = `activation { udev_sync = 0 udev_rules = 0 monitoring = 0 verify_udev_operations = 0 }
devices { obtain_device_list_from_udev = 0 external_device_info_source = "none" use_devicesfile = 0 scan = [ "/dev" ] }
global { use_lvmpolld = 0 event_activation = 0 }
backup { backup = 0 archive = 0 }
report { compact_output = 0 }
`

// addBusybox takes busybox for all commands that no tool of the host does.
func (t tree) addBusybox() error {
	path, err := lookTool("busybox")
	if err != nil {
		return err
	}
	if out, err := exec.Command("ldd", path).CombinedOutput(); err == nil || !strings.Contains(string(out), "not a dynamic executable") {
		return errors.New("busybox is not the static one: install busybox-static")
	}
	t.copyFile("usr/bin/busybox", path)
	out, err := exec.Command(path, "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	for _, applet := range strings.Fields(string(out)) {
		if name := "usr/bin/" + applet; t[name].mode == 0 {
			t.link(name, "busybox")
		}
	}
	return nil
}

// addModules takes modules into t, so that modprobe in the guest finds them, and
// returns the list of what to load at boot, in order.
func (t tree) addModules(k Kernel, work string, load, loadable []string) (string, error) {
	var list strings.Builder
	listed := map[string]bool{}
	base := filepath.Join(work, "modules")
	at := filepath.Join("lib/modules", k.Release)
	for i, module := range slices.Concat(load, loadable) {
		name, params, _ := strings.Cut(module, " ")
		var files []string
		if strings.HasSuffix(name, ".ko") {
			modinfo, err := lookTool("modinfo")
			if err != nil {
				return "", err
			}
			needs, err := exec.Command(modinfo, "-F", "depends", name).Output()
			if err != nil {
				return "", fmt.Errorf("modinfo %s: %w", name, err)
			}
			for need := range strings.FieldsFuncSeq(strings.TrimSpace(string(needs)), func(r rune) bool { return r == ',' }) {
				more, err := k.moduleFiles(need)
				if err != nil {
					return "", err
				}
				files = append(files, more...)
			}
			files = append(files, name)
		} else {
			var err error
			if files, err = k.moduleFiles(name); err != nil {
				return "", err
			}
		}
		for j, file := range files {
			to, err := k.stageModule(base, file)
			if err != nil {
				return "", err
			}
			t.copyFile("usr/"+to, filepath.Join(base, to))
			if i >= len(load) || listed[to] {
				continue
			}
			listed[to] = true
			line := "/" + to
			if j == len(files)-1 && params != "" {
				line += " " + params
			}
			list.WriteString(line + "\n")
		}
	}
	if err := os.MkdirAll(filepath.Join(base, at), 0o755); err != nil {
		return "", err
	}
	for _, file := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		data, err := os.ReadFile(filepath.Join(k.Dir, at, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(base, at, file), data, 0o644)
		}
		if err != nil {
			return "", err
		}
	}
	depmod, err := lookTool("depmod")
	if err != nil {
		return "", err
	}
	if out, err := exec.Command(depmod, "-b", base, k.Release).CombinedOutput(); err != nil {
		return "", fmt.Errorf("depmod: %w: %s", err, out)
	}
	for _, file := range []string{"modules.dep", "modules.alias", "modules.symbols", "modules.softdep", "modules.builtin"} {
		t.copyFile(filepath.Join("usr", at, file), filepath.Join(base, at, file))
	}
	return list.String(), nil
}

// stageModule puts a module below base where it would be installed, unpacked, and
// returns its path there.
func (k Kernel) stageModule(base, file string) (string, error) {
	to := filepath.Join("lib/modules", k.Release, "extra", filepath.Base(file))
	if in, err := filepath.Rel(k.Dir, file); err == nil && !strings.HasPrefix(in, "..") {
		to = strings.TrimSuffix(in, ".xz")
	}
	if err := os.MkdirAll(filepath.Dir(filepath.Join(base, to)), 0o755); err != nil {
		return "", err
	}
	cat := []string{"cat", file}
	if strings.HasSuffix(file, ".xz") {
		cat = []string{"xz", "-dc", file}
	}
	data, err := exec.Command(cat[0], cat[1:]...).Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(cat, " "), err)
	}
	return to, os.WriteFile(filepath.Join(base, to), data, 0o644)
}
