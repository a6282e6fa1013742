// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/dsync-backup/dsync-backup/bench/host"
)

// postgresTools read a device that is mounted. Only the first two make a point
// in time of it; the others read it while nothing is written.
var postgresTools = []string{"dsync-backup", "extract | merge", "rsync in place", "restic stdin"}

// cluster is a PostgreSQL on a mounted file system.
type cluster struct {
	bin, mount, data string
}

// runPostgres has pgbench work on a database that lies on the device, and
// syncs after each stretch of work, with the server running and idle.
func runPostgres(ctx context.Context, b *Bench) (err error) {
	bin, err := postgresBin()
	if err != nil {
		b.Log("  left out: %v", err)
		return nil
	}
	size := max(b.Size, 1<<30) // its logs alone want some room
	l, err := b.newLab(ctx, size, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	l.Mode = "precopy"
	c := &cluster{bin: bin, mount: filepath.Join(l.Dir, "mnt")}
	if err := c.start(ctx, l.Disk.Path); err != nil {
		return errors.Join(err, c.stop())
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	// A scale of 1 is about 15 MB: the database fills a third of the device.
	if err := c.pgbench(ctx, "-q", "-i", "-s", fmt.Sprint(size/3/(15<<20))); err != nil {
		return err
	}
	if err := l.use(ctx, postgresTools...); err != nil {
		return err
	}
	for round := range b.Rounds + 1 {
		what := "after pgbench"
		if round == 0 {
			what = "first"
		} else if err := c.pgbench(ctx, "-n", "-c", "4", "-j", "2", "-T", fmt.Sprint(int(b.Workload.Seconds()))); err != nil {
			return err
		}
		if err := c.psql(ctx, "checkpoint"); err != nil {
			return err
		}
		dirty, err := l.dirty(ctx)
		if err != nil {
			return err
		}
		if err := l.round(ctx, "postgres", what, round, dirty); err != nil {
			return err
		}
	}
	return nil
}

// dirty is what the tracker has marked since the last rotation, in bytes.
func (l *lab) dirty(ctx context.Context) (int64, error) {
	syscall.Sync()
	cost, err := l.dsync(ctx, "track", "status", "--json", l.Disk.Path)
	if err != nil {
		return 0, err
	}
	return dirtyBytes(cost.Stdout)
}

// postgresBin finds the newest server.
func postgresBin() (string, error) {
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	for i := len(dirs) - 1; i >= 0; i-- {
		if _, err := os.Stat(filepath.Join(dirs[i], "pgbench")); err == nil {
			return dirs[i], nil
		}
	}
	return "", errors.New("PostgreSQL is not installed")
}

// as runs a program of the server's as its user, which must not be root.
func (c *cluster) as(ctx context.Context, args ...string) error {
	args[0] = filepath.Join(c.bin, args[0])
	_, err := host.Output(ctx, append([]string{"runuser", "-u", "postgres", "--"}, args...)...)
	return err
}

func (c *cluster) start(ctx context.Context, device string) error {
	if _, err := host.Output(ctx, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device); err != nil {
		return err
	}
	if err := os.Mkdir(c.mount, 0o755); err != nil {
		return err
	}
	// The folders above belong to root alone.
	for dir := filepath.Dir(c.mount); strings.HasPrefix(filepath.Base(dir), "lab-") || strings.HasPrefix(filepath.Base(dir), "dsync-bench-"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil {
			return err
		}
	}
	if _, err := host.Output(ctx, "mount", device, c.mount); err != nil {
		return err
	}
	if _, err := host.Output(ctx, "chown", "postgres", c.mount); err != nil {
		return err
	}
	c.data = filepath.Join(c.mount, "data")
	if err := c.as(ctx, "initdb", "--no-sync", "-D", c.data); err != nil {
		return err
	}
	return c.as(ctx, "pg_ctl", "-D", c.data, "-w", "-l", filepath.Join(c.mount, "log"), "-o", "-c listen_addresses= -k "+c.mount+" -c max_wal_size=256MB -c shared_buffers=128MB", "start")
}

func (c *cluster) stop() error {
	ctx := context.Background()
	if c.data != "" {
		_ = c.as(ctx, "pg_ctl", "-D", c.data, "-w", "-m", "fast", "stop") // it may not run
	}
	if exec.Command("mountpoint", "-q", c.mount).Run() != nil {
		return nil
	}
	_, err := host.Output(ctx, "umount", c.mount)
	return err
}

func (c *cluster) pgbench(ctx context.Context, args ...string) error {
	return c.as(ctx, append(append([]string{"pgbench", "-h", c.mount}, args...), "postgres")...)
}

func (c *cluster) psql(ctx context.Context, command string) error {
	return c.as(ctx, "psql", "-h", c.mount, "-c", command, "postgres")
}

// dirtyBytes reads what track status prints of one device.
func dirtyBytes(status []byte) (int64, error) {
	var s []struct {
		BlockSize   int64 `json:"block_size"`
		DirtyBlocks int64 `json:"dirty_blocks"`
	}
	if err := json.Unmarshal(status, &s); err != nil || len(s) != 1 {
		return 0, fmt.Errorf("track status: %w: %q", err, status)
	}
	return s[0].BlockSize * s[0].DirtyBlocks, nil
}
