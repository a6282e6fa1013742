// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// BuildModule builds the kernel module of a folder of the project (such as
// "kernel/module") for k and returns the folder with the .ko files. Warnings are
// errors. Nothing is written beside the sources: a copy of them is built in .build,
// once for each state of them.
func BuildModule(t testing.TB, k Kernel, folder string) string {
	t.Helper()
	dir, err := buildModule(k, folder)
	if err != nil {
		t.Fatal(fmt.Errorf("build %s for kernel %s: %w", folder, k.Name, err))
	}
	return dir
}

func buildModule(k Kernel, folder string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	sources, sum, err := moduleSources(filepath.Join(root, folder))
	if err != nil {
		return "", err
	}
	built := filepath.Join(root, ".build/modules", fmt.Sprintf("%s-%s-%.12s", filepath.Base(folder), k.Release, sum))
	if _, err := os.Stat(built); err == nil {
		return built, nil
	}
	if err := os.MkdirAll(filepath.Dir(built), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(built), ".tmp.")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	for name, data := range sources {
		if err := os.WriteFile(filepath.Join(tmp, name), data, 0o644); err != nil {
			return "", err
		}
	}
	// Types for BPF programs are nothing that a test needs, and pahole, which makes them.
	cmd := exec.Command("make", "-s", "-C", k.Headers(), "M="+tmp, "W=1", "KCFLAGS=-Werror", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules")
	// What a make above set for itself is not meant for the kernel's.
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MFLAGS=", "MAKELEVEL=", "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	if err := os.Rename(tmp, built); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return built, os.Chmod(built, 0o755)
}

// moduleSources reads what a module is built from, and sums it up.
func moduleSources(folder string) (map[string][]byte, string, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, "", err
	}
	sources, sum := map[string][]byte{}, sha256.New()
	for _, e := range entries {
		name := e.Name()
		ext := filepath.Ext(name)
		if !e.Type().IsRegular() || strings.HasSuffix(name, ".mod.c") ||
			(ext != ".c" && ext != ".h" && ext != ".S" && name != "Kbuild" && name != "Makefile") {
			continue
		}
		data, err := os.ReadFile(filepath.Join(folder, name))
		if err != nil {
			return nil, "", err
		}
		sources[name] = data
		fmt.Fprintf(sum, "%s %d\n%s", name, len(data), data)
	}
	return sources, fmt.Sprintf("%x", sum.Sum(nil)), nil
}
