// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

const testPassword = "correct horse"

// lightKDF keeps tests fast; restic takes the parameters from the key file.
var lightKDF = KDFParams{N: 1024, R: 8, P: 1}

// stock is a stock restic program.
type stock struct {
	version, path string
}

// stockRestics finds the two versions that everything is proven against. A
// missing one fails the test.
func stockRestics(t testing.TB) []stock {
	t.Helper()
	return []stock{
		{"0.14.0", findProgram(t, "RESTIC_014", "restic", "restic 0.14.0")},
		{"0.18.0", findProgram(t, "RESTIC_018", filepath.Join(moduleRoot(t), ".build", "restic-0.18"), "restic 0.18.0")},
	}
}

func findProgram(t testing.TB, env, fallback, version string) string {
	t.Helper()
	name := os.Getenv(env)
	if name == "" {
		name = fallback
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("the tests need %s: set %s to its path: %v", version, env, err)
	}
	out, err := exec.Command(path, "version").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), version+" ") {
		t.Fatalf("%s (from %s) should be %s, but says %q, %v", path, env, version, out, err)
	}
	return path
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, statErr := os.Stat(filepath.Join(dir, "go.mod")); statErr == nil {
			return dir
		}
		if dir == "/" {
			err = errors.New("no go.mod above the test")
		}
	}
	t.Fatal(err)
	return ""
}

// command is restic on a repository. Extra environment goes in env.
func (s stock) command(t testing.TB, dir string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, s.path, append([]string{"--no-cache", "-r", dir}, args...)...)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+testPassword, "RESTIC_FROM_PASSWORD="+testPassword,
		"RESTIC_PASSWORD2="+testPassword, "RESTIC_PROGRESS_FPS=0.01")
	return cmd
}

// run runs restic and returns its standard output; a failure fails the test.
func (s stock) run(t testing.TB, dir string, args ...string) []byte {
	t.Helper()
	out, err := s.try(t, dir, args...)
	if err != nil {
		t.Fatalf("restic %s: %v", s.version, err)
	}
	return out
}

// try is run for when restic may fail.
func (s stock) try(t testing.TB, dir string, args ...string) ([]byte, error) {
	t.Helper()
	cmd := s.command(t, dir, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("restic %s: %w\n%s%s", strings.Join(args, " "), err, out.Bytes(), errOut.Bytes())
	}
	return out.Bytes(), nil
}

// mustCheckClean lets both versions read every byte.
func mustCheckClean(t testing.TB, dir string) {
	t.Helper()
	for _, s := range stockRestics(t) {
		out := s.run(t, dir, "check", "--read-data")
		if !bytes.Contains(out, []byte("no errors were found")) {
			t.Fatalf("restic %s check: %s", s.version, out)
		}
	}
}

func openLocal(t testing.TB, dir string) backend.Backend {
	t.Helper()
	be, err := local.Open(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { be.Close() })
	return be
}

// newRepo makes a repository in a new directory, which restic checks when the
// test is over.
func newRepo(t testing.TB, opts Options) (*Repository, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	opts.KDF = lightKDF
	r, err := Init(t.Context(), openLocal(t, dir), testPassword, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r, dir
}

// reopen opens the repository anew and loads its index.
func reopen(t testing.TB, dir string, opts Options) *Repository {
	t.Helper()
	r, err := Open(t.Context(), openLocal(t, dir), testPassword, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

func fromJSON[T any](t testing.TB, data []byte) (v T) {
	t.Helper()
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatalf("decode %.200q: %v", data, err)
	}
	return v
}
