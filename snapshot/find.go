// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// ErrNoDevice says that a snapshot holds no device.
var ErrNoDevice = errors.New("the snapshot holds no device: restic made it from files")

// Store is the repository as layers are read from it.
type Store struct{ *repo.Repository }

// LoadMeta implements [layer.Loader].
func (s Store) LoadMeta(ctx context.Context, id repo.ID) ([]byte, error) {
	return s.LoadBlob(ctx, repo.BlobHandle{Type: repo.DataBlob, ID: id}, repo.KindMeta)
}

// Device is a device inside a snapshot.
type Device struct {
	Snapshot repo.ID
	Name     string // the path in the snapshot
	Manifest *Manifest
}

// RepairedError is the [layer.ErrDamaged] of a device whose layers are not those that
// its manifest names: another program rewrote the snapshot, as restic's repair does
// with what is lost. What the layers that are there give is not certain.
type RepairedError struct {
	Device Device
	Layers repo.ID // the tree that is there
}

func (e *RepairedError) Error() string {
	return fmt.Sprintf("%v: its layers are tree %s, but %s names %s; it was repaired or rewritten",
		layer.ErrDamaged, e.Layers.Str(), manifestFile, e.Device.Manifest.Layers.Str())
}

func (e *RepairedError) Unwrap() error { return layer.ErrDamaged }

// Devices finds the devices in a snapshot: one, or the several of a
// consistency group. A snapshot without any is ErrNoDevice; one whose layers
// are not those that the manifest names is a [RepairedError].
func Devices(ctx context.Context, from Store, id repo.ID, sn *repo.Snapshot) ([]Device, error) {
	var out []Device
	for _, path := range sn.Paths {
		m, err := manifestAt(ctx, from, sn, path)
		if errors.Is(err, ErrNoDevice) {
			continue
		}
		if repaired := new(RepairedError); errors.As(err, &repaired) {
			repaired.Device.Snapshot, repaired.Device.Name = id, path
		}
		if err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", id.Str(), err)
		}
		out = append(out, Device{id, path, m})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("snapshot %s: %w", id.Str(), ErrNoDevice)
	}
	return out, nil
}

func manifestAt(ctx context.Context, from Store, sn *repo.Snapshot, path string) (*Manifest, error) {
	id := sn.Tree
	for _, name := range strings.Split(strings.Trim(path, "/"), "/") {
		n, err := lookup(ctx, from, id, name)
		if err != nil {
			return nil, err
		}
		if n == nil || n.Subtree == nil {
			return nil, ErrNoDevice
		}
		id = n.Subtree
	}
	file, err := lookup(ctx, from, id, manifestFile)
	if err != nil {
		return nil, err
	}
	layers, err := lookup(ctx, from, id, layersFolder)
	if err != nil {
		return nil, err
	}
	if file == nil || layers == nil || layers.Subtree == nil {
		return nil, ErrNoDevice
	}
	b, err := layer.ReadFile(ctx, from, file)
	if err != nil {
		return nil, err
	}
	m, err := ParseManifest(b)
	if err != nil {
		return nil, err
	}
	if *layers.Subtree != m.Layers {
		return nil, &RepairedError{Device{Manifest: m}, *layers.Subtree}
	}
	return m, nil
}

// lookup is the node of that name in a tree, or nil.
func lookup(ctx context.Context, from Store, tree *repo.ID, name string) (*repo.Node, error) {
	if tree == nil {
		return nil, nil
	}
	t, err := from.LoadTree(ctx, *tree)
	if err != nil {
		return nil, err
	}
	return t.Find(name), nil
}
