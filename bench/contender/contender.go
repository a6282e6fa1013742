// SPDX-License-Identifier: BSD-2-Clause

// Package contender has the tools that the benchmark compares: each of them
// brings a copy of a device, of whatever form, to what the device holds now.
package contender

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

// Programs are where the tools are; an empty one is not there.
type Programs struct {
	Self, Dsync, Restic, MinIO, Kopia, Rsync, Borg string
}

// Lab is what contenders share.
type Lab struct {
	Programs
	Disk  *host.Disk // what they read; the tools that only know files read its file
	Dir   string     // a folder for each of them lies here
	State string     // of dsync-backup: epochs and positions
	Mode  string     // way of dsync-backup to a point in time; "" where nothing is mounted
}

// Contender is a tool with a copy of its own of the lab's device.
type Contender interface {
	Name() string
	// Sync brings the copy to what the device holds, durably, and fills in
	// what it cost. Caches are dropped before.
	Sync(ctx context.Context, row *result.Row) error
	// Verify compares the copy with the device, where that takes no restore.
	Verify(ctx context.Context) error
	// Close removes the copy.
	Close() error
}

// Names are all contenders, in the order of the report.
var Names = []string{
	"dsync-backup", "dsync-backup, keyring", "dsync-backup, MinIO", "extract | merge", "rsync in place", "rsync whole file",
	"copy", "restic image", "restic stdin", "borg", "kopia",
}

// ErrMissing says that a tool is not installed.
var ErrMissing = errors.New("not installed")

// New makes a contender with an empty copy.
func New(ctx context.Context, name string, lab *Lab, number int) (Contender, error) {
	dir := filepath.Join(lab.Dir, fmt.Sprintf("copy-%d", number))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	b := base{name: name, lab: lab, dir: dir}
	switch name {
	case "dsync-backup", "dsync-backup, keyring":
		return newDsync(ctx, b, filepath.Join(dir, "repository"))
	case "dsync-backup, MinIO":
		return newDsyncMinIO(ctx, b)
	case "extract | merge":
		return &pipeline{base: b}, nil
	case "rsync in place", "rsync whole file":
		return newRsync(b)
	case "copy":
		return &plainCopy{b}, nil
	case "restic image", "restic stdin":
		return newRestic(ctx, b)
	case "borg":
		return newBorg(ctx, b)
	case "kopia":
		return newKopia(ctx, b)
	}
	return nil, fmt.Errorf("no tool is called %q", name)
}

// base is what every contender has.
type base struct {
	name string
	lab  *Lab
	dir  string
}

func (b *base) Name() string { return b.name }

func (b *base) Close() error { return os.RemoveAll(b.dir) }

// run runs a command that reads the device, and fills in what all of them have.
func (b *base) run(ctx context.Context, c host.Command, row *result.Row) (host.Cost, error) {
	before, err := b.lab.Disk.BytesRead()
	if err != nil {
		return host.Cost{}, err
	}
	cost, err := host.Run(ctx, c)
	if err != nil {
		return cost, err
	}
	after, err := b.lab.Disk.BytesRead()
	row.Seconds, row.SourceCPU, row.Memory, row.Read = cost.Seconds, cost.CPU, cost.Memory, after-before
	return cost, err
}

// stored runs fn and fills in by how much a folder grew meanwhile.
func stored(dir string, row *result.Row, fn func() error) error {
	before, err := host.Size(dir)
	if err != nil {
		return err
	}
	if err := fn(); err != nil {
		return err
	}
	after, err := host.Size(dir)
	row.Stored = max(0, after-before)
	return err
}

// compare compares a device with a file, byte by byte.
func compare(ctx context.Context, disk *host.Disk, file string) error {
	_, err := host.Output(ctx, "cmp", disk.Path, file)
	return err
}
