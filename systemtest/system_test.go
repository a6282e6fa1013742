// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/snapshot"
)

var (
	dsync     string // the built command
	restics   map[string]string
	moduleDir string
)

func TestMain(m *testing.M) {
	if len(os.Args) == 5 && os.Args[1] == userArg {
		os.Exit(userMain(os.Args[2:]))
	}
	if len(os.Args) > 2 && os.Args[1] == measureArg {
		os.Exit(measureMain(os.Args[2:]))
	}
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			fmt.Fprintln(os.Stderr, "systemtest needs root: it makes loop devices, mounts them and tracks them")
			return 1
		}
		dir, err := os.MkdirTemp("", "dsync-systemtest-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		moduleDir, _ = filepath.Abs("..")
		dsync = filepath.Join(dir, "dsync-backup")
		build := exec.Command("tools/static", "build", "-o", dsync, "./cmd/dsync-backup")
		build.Dir = moduleDir
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build dsync-backup: %v\n%s", err, out)
			return 1
		}
		restics = map[string]string{
			"0.14": envOr("RESTIC_014", "restic"),
			"0.18": envOr("RESTIC_018", filepath.Join(moduleDir, ".build", "restic-0.18")),
		}
		for v, path := range restics {
			out, err := exec.Command(path, "version").CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), "restic "+v) {
				fmt.Fprintf(os.Stderr, "restic %s is needed, %s says: %s %v (run make test)\n", v, path, out, err)
				return 1
			}
		}
		return m.Run()
	}())
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// count is full under SOAK=1, else short.
func count(full, short int) int {
	if os.Getenv("SOAK") == "1" {
		return full
	}
	return short
}

// random is seeded by SEED, or by the clock, and prints its seed.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("SEED"); v != "" {
		s, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("SEED=%d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// result is how a command ended.
type result struct {
	code           int
	stdout, stderr string
}

// env is a repository, and folders of its own for state and caches.
type env struct {
	t    testing.TB
	repo string
	vars []string
}

// newEnv gives a location with folders, and no repository yet.
func newEnv(t testing.TB, location string, vars ...string) *env {
	dir := t.TempDir()
	return &env{t: t, repo: location, vars: append([]string{
		"RESTIC_REPOSITORY=" + location, "RESTIC_PASSWORD=geheim", "RESTIC_CACHE_DIR=" + filepath.Join(dir, "restic-cache"),
		"DSYNC_STATE_DIR=" + filepath.Join(dir, "state"), "DSYNC_CACHE_DIR=" + filepath.Join(dir, "cache"),
	}, vars...)}
}

// localEnv makes a repository in a temporary folder.
func localEnv(t testing.TB) *env {
	e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
	e.must("init")
	return e
}

// sibling is another repository on the same machine: it shares the state.
func (e *env) sibling(location string, vars ...string) *env {
	s := newEnv(e.t, location, vars...)
	for i, v := range s.vars {
		if strings.HasPrefix(v, "DSYNC_STATE_DIR=") {
			for _, mine := range e.vars {
				if strings.HasPrefix(mine, "DSYNC_STATE_DIR=") {
					s.vars[i] = mine
				}
			}
		}
	}
	return s
}

// command prepares the built command.
func (e *env) command(args ...string) *exec.Cmd {
	return e.prepare(dsync, args...)
}

func (e *env) prepare(path string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	e.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), e.vars...)
	return cmd
}

// try runs the command, however it ends.
func (e *env) try(args ...string) result {
	e.t.Helper()
	return finish(e.t, e.command(args...))
}

func finish(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("run %s: %v", cmd, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// must runs the command and fails the test if it fails.
func (e *env) must(args ...string) string {
	e.t.Helper()
	r := e.try(args...)
	if r.code != 0 {
		e.t.Fatalf("dsync-backup %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// backup backs up and returns the summary.
func (e *env) backup(args ...string) snapshot.Summary {
	e.t.Helper()
	return summary(e.t, e.must(append([]string{"backup", "--json"}, args...)...))
}

func summary(t testing.TB, out string) (s snapshot.Summary) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &s); err != nil || s.MessageType != "summary" {
		t.Fatalf("the last line is no summary: %q: %v", lines[len(lines)-1], err)
	}
	return s
}

// restic runs stock restic of a version.
func (e *env) restic(version string, args ...string) string {
	e.t.Helper()
	r := finish(e.t, e.prepare(restics[version], args...))
	if r.code != 0 {
		e.t.Fatalf("restic %s %s: exit code %d\n%s%s", version, strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// check has both versions of stock restic read the whole repository.
func (e *env) check() {
	e.t.Helper()
	for version := range restics {
		e.restic(version, "check", "--read-data")
	}
}

// run runs a command of the system.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// disk is a loop device and the file behind it.
type disk struct {
	t          testing.TB
	path, file string
	mnt        string
}

// newDisk makes a loop device of size bytes, sparse.
func newDisk(t testing.TB, size int64) *disk {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(file)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, file: file, path: run(t, "losetup", "--find", "--show", file)}
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", d.path).Run() })
	return d
}

// track has the device tracked until the test ends.
func (d *disk) track(e *env) {
	d.t.Helper()
	e.must("track", "start", d.path)
	d.t.Cleanup(func() { e.try("track", "stop", d.path) })
}

// mkfs makes a file system and mounts it until the test ends.
func (d *disk) mkfs(kind string) {
	d.t.Helper()
	args := map[string][]string{
		"ext4": {"mkfs.ext4", "-q", "-F"}, "xfs": {"mkfs.xfs", "-q", "-f"}, "btrfs": {"mkfs.btrfs", "-q", "-f"},
	}[kind]
	run(d.t, args[0], append(args[1:], d.path)...)
	d.mount()
}

func (d *disk) mount() {
	d.t.Helper()
	if d.mnt == "" {
		d.mnt = d.t.TempDir()
		d.t.Cleanup(func() {
			_ = exec.Command("fsfreeze", "-u", d.mnt).Run()
			_ = exec.Command("umount", d.mnt).Run()
		})
	}
	run(d.t, "mount", d.path, d.mnt)
}

func (d *disk) umount() {
	d.t.Helper()
	run(d.t, "umount", d.mnt)
}

// copyTo copies what the device holds now to a file, holes left out.
func (d *disk) copyTo(file string) {
	d.t.Helper()
	run(d.t, "sync", "-f", d.file)
	run(d.t, "cp", "--sparse=always", d.file, file)
}

// bytesRead is how much has been read of the device since it was made, as the kernel counts.
func (d *disk) bytesRead() int64 {
	d.t.Helper()
	stat, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.path), "stat"))
	if err != nil {
		d.t.Fatal(err)
	}
	sectors, err := strconv.ParseInt(strings.Fields(string(stat))[2], 10, 64)
	if err != nil {
		d.t.Fatal(err)
	}
	return sectors << 9
}

// same fails the test if two images differ.
func same(t testing.TB, a, b string) {
	t.Helper()
	if out, err := exec.Command("cmp", a, b).CombinedOutput(); err != nil {
		t.Fatalf("%s and %s differ: %s", a, b, out)
	}
}
