// SPDX-License-Identifier: BSD-2-Clause

package contender

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

const password = "benchmark"

// dsync backs up the tracked device into a repository.
type dsync struct {
	base
	env   []string
	store string // the folder in which the repository lies in the end
	sent  func() int64
	close func() error
	next  bool // there is a backup to go on from
}

// Env are the variables of dsync-backup for a repository in a folder.
func Env(lab *Lab, dir, location string) []string {
	return []string{
		"RESTIC_REPOSITORY=" + location, "RESTIC_PASSWORD=" + password, "RESTIC_CACHE_DIR=" + filepath.Join(dir, "restic-cache"),
		"DSYNC_STATE_DIR=" + lab.State, "DSYNC_CACHE_DIR=" + filepath.Join(dir, "cache"),
	}
}

// newDsync has restic make the repository, so that its key costs as much to
// derive as that of restic's.
func newDsync(ctx context.Context, b base, location string) (Contender, error) {
	d := &dsync{base: b, env: Env(b.lab, b.dir, location), store: location}
	if strings.HasSuffix(b.name, "keyring") {
		d.env = append(d.env, "DSYNC_KEYRING=1h")
	}
	_, err := host.Run(ctx, host.Command{Args: []string{b.lab.Restic, "init", "-q"}, Env: d.env})
	return d, err
}

func newDsyncMinIO(ctx context.Context, b base) (Contender, error) {
	if b.lab.MinIO == "" {
		return nil, fmt.Errorf("MinIO: %w", ErrMissing)
	}
	m, err := startMinIO(ctx, b.lab.MinIO, filepath.Join(b.dir, "minio"))
	if err != nil {
		return nil, err
	}
	d := &dsync{base: b, store: m.dir, sent: m.proxy.sent.Load, close: m.stop}
	d.env = append(Env(b.lab, b.dir, "s3:http://"+m.proxy.addr+"/bench"), m.env()...)
	_, err = host.Run(ctx, host.Command{Args: []string{b.lab.Restic, "init", "-q"}, Env: d.env})
	if err != nil {
		_ = m.stop()
	}
	return d, err
}

func (d *dsync) Sync(ctx context.Context, row *result.Row) error {
	args := []string{d.lab.Dsync, "backup", "--json", d.lab.Disk.Path}
	if d.lab.Mode != "" {
		args = append(args, "--snapshot", d.lab.Mode)
	}
	var sent int64
	if d.sent != nil {
		sent = d.sent()
	}
	err := stored(d.store, row, func() error {
		cost, err := d.run(ctx, host.Command{Args: args, Env: d.env}, row)
		if err != nil {
			return err
		}
		var s struct {
			Changes  string `json:"changes"`
			Fallback string `json:"fallback_reason"`
		}
		lines := strings.Split(strings.TrimSpace(string(cost.Stdout)), "\n")
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &s); err != nil {
			return fmt.Errorf("summary of backup: %w", err)
		}
		want := "full"
		if d.next {
			want = "tracker"
		}
		// What was measured must be what the report says was.
		if s.Changes != want {
			return fmt.Errorf("the changes came from %q, want %q: %s", s.Changes, want, s.Fallback)
		}
		d.next = true
		return nil
	})
	row.Sent = row.Stored
	if d.sent != nil {
		row.Sent = d.sent() - sent
	}
	return err
}

func (d *dsync) Verify(ctx context.Context) error {
	_, err := host.Run(ctx, host.Command{Args: []string{d.lab.Dsync, "-q", "verify", "latest", d.lab.Disk.Path}, Env: d.env})
	return err
}

func (d *dsync) Close() error {
	if d.close != nil {
		if err := d.close(); err != nil {
			return err
		}
	}
	return d.base.Close()
}

// pipeline is extract on one side and merge on the other.
type pipeline struct{ base }

func (p *pipeline) target() string { return filepath.Join(p.dir, "image") }

func (p *pipeline) Sync(ctx context.Context, row *result.Row) error {
	env := []string{"DSYNC_STATE_DIR=" + p.lab.State}
	extract := []string{p.lab.Dsync, "-q", "extract", "--to", "bench", p.lab.Disk.Path}
	if p.lab.Mode != "" {
		extract = append(extract, "--snapshot", p.lab.Mode)
	}
	before, err := p.lab.Disk.BytesRead()
	if err != nil {
		return err
	}
	from, to, err := host.Pipe(ctx,
		host.Command{Args: extract, Env: env},
		host.Command{Args: []string{p.lab.Dsync, "-q", "merge", "--json", "--force", p.target()}, Env: env})
	if err != nil {
		return err
	}
	after, err := p.lab.Disk.BytesRead()
	if err != nil {
		return err
	}
	var s struct {
		Position      json.RawMessage `json:"position"`
		BytesReceived int64           `json:"bytes_received"`
		BytesWritten  int64           `json:"bytes_written"`
	}
	lines := strings.Split(strings.TrimSpace(string(to.Stdout)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &s); err != nil {
		return fmt.Errorf("summary of merge: %w", err)
	}
	position, err := host.Output(ctx, p.lab.Dsync, "merge", "--position", p.target())
	if err != nil {
		return err
	}
	commit, err := host.Run(ctx, host.Command{Args: []string{p.lab.Dsync, "-q", "extract", "--to", "bench", "--commit", position, p.lab.Disk.Path}, Env: env})
	if err != nil {
		return err
	}
	row.Seconds = max(from.Seconds, to.Seconds) + commit.Seconds
	row.SourceCPU, row.OtherCPU, row.Memory = from.CPU+commit.CPU, to.CPU, from.Memory
	row.Read, row.Sent, row.Stored = after-before, s.BytesReceived, s.BytesWritten
	return nil
}

func (p *pipeline) Verify(ctx context.Context) error { return compare(ctx, p.lab.Disk, p.target()) }
