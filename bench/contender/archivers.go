// SPDX-License-Identifier: BSD-2-Clause

package contender

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

// archiver is a backup program that reads everything and stores what it has
// not seen: restic, borg, kopia.
type archiver struct {
	base
	env   []string
	store string
	args  func(round int) []string
	stdin bool // it is given the device on stdin, else the device or its image
	image bool // it reads the image file, past the device
	round int
}

func (a *archiver) Sync(ctx context.Context, row *result.Row) error {
	err := stored(a.store, row, func() error {
		c := host.Command{Args: a.args(a.round), Env: a.env}
		a.round++
		if a.stdin {
			f, err := os.Open(a.lab.Disk.Path)
			if err != nil {
				return err
			}
			defer f.Close()
			c.Stdin = f
		}
		cost, err := a.run(ctx, c, row)
		if a.image {
			row.Read = cost.Blocks
		}
		return err
	})
	row.Sent = row.Stored // the store is at the other end
	return err
}

// Verify leaves it to the tool: it would take a restore.
func (a *archiver) Verify(context.Context) error { return nil }

func newRestic(ctx context.Context, b base) (Contender, error) {
	a := &archiver{base: b, store: filepath.Join(b.dir, "repository")}
	a.env = Env(b.lab, b.dir, a.store)
	if b.name == "restic stdin" {
		a.stdin = true
		a.args = func(int) []string {
			return []string{b.lab.Restic, "-q", "backup", "--stdin", "--stdin-filename", "disk"}
		}
	} else {
		a.image = true
		a.args = func(int) []string { return []string{b.lab.Restic, "-q", "backup", b.lab.Disk.File} }
	}
	_, err := host.Run(ctx, host.Command{Args: []string{b.lab.Restic, "init", "-q"}, Env: a.env})
	return a, err
}

func newBorg(ctx context.Context, b base) (Contender, error) {
	if b.lab.Borg == "" {
		return nil, fmt.Errorf("borg: %w", ErrMissing)
	}
	a := &archiver{base: b, store: filepath.Join(b.dir, "repository")}
	a.env = []string{"BORG_PASSPHRASE=" + password, "BORG_BASE_DIR=" + b.dir, "BORG_RELOCATED_REPO_ACCESS_IS_OK=yes"}
	a.args = func(round int) []string {
		return []string{b.lab.Borg, "create", "--read-special", "--compression", "zstd", fmt.Sprintf("%s::round-%d", a.store, round), b.lab.Disk.Path}
	}
	_, err := host.Run(ctx, host.Command{Args: []string{b.lab.Borg, "init", "--encryption", "repokey-blake2", a.store}, Env: a.env})
	return a, err
}

func newKopia(ctx context.Context, b base) (Contender, error) {
	if b.lab.Kopia == "" {
		return nil, fmt.Errorf("kopia: %w", ErrMissing)
	}
	a := &archiver{base: b, store: filepath.Join(b.dir, "repository"), stdin: true}
	if err := os.MkdirAll(a.store, 0o700); err != nil {
		return nil, err
	}
	a.env = []string{
		"KOPIA_PASSWORD=" + password, "KOPIA_CONFIG_PATH=" + filepath.Join(b.dir, "config"), "KOPIA_CACHE_DIRECTORY=" + filepath.Join(b.dir, "cache"),
		"KOPIA_LOG_DIR=" + filepath.Join(b.dir, "log"), "KOPIA_CHECK_FOR_UPDATES=false",
	}
	a.args = func(int) []string {
		return []string{b.lab.Kopia, "--no-progress", "snapshot", "create", "--no-auto-maintenance", "--stdin-file", "disk", filepath.Join(b.dir, "source")}
	}
	for _, args := range [][]string{
		{"repository", "create", "filesystem", "--path", a.store},
		{"policy", "set", "--global", "--compression", "zstd"},
	} {
		if _, err := host.Run(ctx, host.Command{Args: append([]string{b.lab.Kopia}, args...), Env: a.env}); err != nil {
			return nil, err
		}
	}
	return a, nil
}
