// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// table names the kernels that every scenario runs on, as tools/kernels does.
var table = []string{"6.1", "6.12"}

// Kernel is one of Debian's kernels, unpacked with its headers.
type Kernel struct {
	Name    string // in the table, such as "6.1"
	Release string // what uname -r says
	Dir     string // where it is unpacked
}

// Image returns the path of the kernel's image.
func (k Kernel) Image() string { return filepath.Join(k.Dir, "boot", "vmlinuz-"+k.Release) }

// Headers returns the folder that modules for the kernel are built against.
func (k Kernel) Headers() string { return filepath.Join(k.Dir, "lib/modules", k.Release, "build") }

// Check says in one line what is missing on this host for booting guests.
func Check() error {
	packages := map[string]string{
		"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "modprobe": "kmod",
		"depmod": "kmod", "xz": "xz-utils", "make": "make", "gcc-12": "gcc-12",
	}
	var missing []string
	for command, pkg := range packages {
		if _, err := lookTool(command); err != nil {
			missing = append(missing, pkg)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("booting virtual machines needs %s: run tools/install test as root", strings.Join(missing, ", "))
	}
	return nil
}

// Each runs a scenario as one subtest for each kernel of the table, named by it, in
// parallel with others: a guest keeps one processor busy, seldom two. Kernels that
// are not there yet are fetched. A test calls Each once, and last.
func Each(t *testing.T, scenario func(t *testing.T, k Kernel)) {
	t.Helper()
	each(t, scenario, func(int) bool { return true })
}

func each(t *testing.T, scenario func(t *testing.T, k Kernel), chosen func(i int) bool) {
	t.Helper()
	t.Parallel()
	for i, name := range table {
		if !chosen(i) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k, err := Get(name)
			if err != nil {
				t.Fatal(err)
			}
			scenario(t, k)
		})
	}
}

// Turn runs one of several like scenarios on one kernel, the n-th on the n-th of the
// table in turn; with KERNELS=all it runs on each.
func Turn(t *testing.T, n int, scenario func(t *testing.T, k Kernel)) {
	t.Helper()
	each(t, scenario, func(i int) bool { return os.Getenv("KERNELS") == "all" || n%len(table) == i })
}

// soak reports that the long counts are asked for.
func soak() bool { return os.Getenv("SOAK") != "" }

// Get returns a kernel of the table, and fetches it first if need be.
func Get(name string) (Kernel, error) {
	if err := Check(); err != nil {
		return Kernel{}, err
	}
	root, err := Root()
	if err != nil {
		return Kernel{}, err
	}
	k := Kernel{Name: name, Dir: filepath.Join(root, ".build/kernels", name)}
	if _, err := os.Stat(filepath.Join(k.Dir, "release")); err != nil {
		out, err := exec.Command(filepath.Join(root, "tools/kernels"), name).CombinedOutput()
		if err != nil {
			return Kernel{}, fmt.Errorf("fetch kernel %s: %w\n%s", name, err, out)
		}
	}
	release, err := os.ReadFile(filepath.Join(k.Dir, "release"))
	if err != nil {
		return Kernel{}, err
	}
	k.Release = strings.TrimSpace(string(release))
	return k, nil
}

// Root returns the top folder of the project's sources.
var Root = sync.OnceValues(func() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("run this inside the project's sources: no go.mod is above")
})

// moduleFiles returns the files of a module and of all that it needs, in the order
// in which they are loaded. A module that is built in has none.
func (k Kernel) moduleFiles(module string) ([]string, error) {
	modprobe, err := lookTool("modprobe")
	if err != nil {
		return nil, err
	}
	out, err := exec.Command(modprobe, "-d", k.Dir, "-S", k.Release, "-C", "/dev/null", "--show-depends", module).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("module %s of kernel %s: %w: %s", module, k.Name, err, strings.TrimSpace(string(out)))
	}
	var files []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "insmod" {
			files = append(files, f[1])
		}
	}
	return files, nil
}
