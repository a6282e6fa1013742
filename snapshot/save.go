// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// Summary is what `backup --json` says at the end. Sizes are in bytes.
type Summary struct {
	MessageType         string   `json:"message_type"` // "summary"
	SnapshotID          repo.ID  `json:"snapshot_id"`
	Parent              *repo.ID `json:"parent"`
	Device              string   `json:"device"`
	DeviceSize          int64    `json:"device_size"`
	Changes             Changes  `json:"changes"`
	FallbackReason      string   `json:"fallback_reason,omitempty"`
	PointInTime         string   `json:"point_in_time"`
	DirtyBytes          int64    `json:"dirty_bytes"`
	BytesRead           int64    `json:"bytes_read"`            // for the change, without what is copied forward or spot-checked
	DataAdded           int64    `json:"data_added"`            // new data blobs before compression
	DataAddedPacked     int64    `json:"data_added_packed"`     // the same as stored
	MetadataAddedPacked int64    `json:"metadata_added_packed"` // trees, indexes and the snapshot as stored
	MergeAddedPacked    int64    `json:"merge_added_packed"`    // metadata of merged layers as stored
	CopiedForwardBytes  int64    `json:"copied_forward_bytes"`  // of the device, stored anew to free worn blobs
	CopiedForwardPacked int64    `json:"copied_forward_packed"` // the same as stored; not in data_added
	Layers              int      `json:"layers"`
	Rounds              int      `json:"rounds"` // copies that were made of what changed
	FreezeSeconds       float64  `json:"freeze_seconds"`
	DurationSeconds     float64  `json:"duration_seconds"`
	SpotCheckedBytes    int64    `json:"spot_checked_bytes"` // read to see whether the tracker can be trusted

	// Position is what the snapshot is complete up to, if that is known.
	Position *kernel.Position `json:"-"`
}

// save names what was stored in a snapshot.
func (b *backup) save(ctx context.Context, res layer.Result) (*Summary, error) {
	b.Progress(Progress{"storing", b.total, b.total})
	identity, err := b.Device.Identity(ctx)
	if err != nil {
		return nil, err
	}
	m := &Manifest{
		Version: manifestVersion, Device: b.Device.Path(), Size: b.Device.Size(), BlockSize: kernel.BlockSize,
		Identity: identity, PointInTime: b.pointInTime(ctx),
		Changes: b.sum.Changes, FallbackReason: b.sum.FallbackReason, SumKey: b.key,
	}
	if b.epoch != nil {
		m.Position = &b.epoch.Position
	}
	if b.parent != nil {
		m.Parent = &b.parent.Snapshot
	}
	b.changed = res.DirtyBytes
	layers, count, err := b.saveLayers(ctx, res.Tree)
	if err != nil {
		return nil, err
	}
	m.Layers, m.Generations = layers, b.generations
	root, err := b.saveRoot(ctx, m)
	if err != nil {
		return nil, err
	}
	if err := b.w.Flush(ctx); err != nil {
		return nil, err
	}
	sn := &repo.Snapshot{
		Time: b.Time, Tree: &root, Paths: []string{b.Name}, Hostname: b.Host,
		Username: b.User.Name, UID: b.User.UID, GID: b.User.GID,
		Tags: append([]string{Tag}, slices.DeleteFunc(slices.Clone(b.Tags), func(t string) bool { return t == Tag })...),
	}
	if b.parent != nil {
		sn.Parent = &b.parent.Snapshot
	}
	id, size, err := b.r.SaveSnapshot(ctx, sn)
	if err != nil {
		return nil, err
	}
	s := &b.sum
	s.MessageType, s.SnapshotID, s.Parent = "summary", id, m.Parent
	s.Device, s.DeviceSize, s.PointInTime = b.Name, m.Size, string(m.PointInTime)
	s.DirtyBytes, s.BytesRead, s.Layers, s.Position = res.DirtyBytes, res.BytesRead, count, m.Position
	b.stored(size)
	s.FreezeSeconds, s.DurationSeconds = b.frozen.Seconds(), time.Since(b.started).Seconds()
	return s, nil
}

// pointInTime looks whether a device that nobody should have written to was
// left alone. A tracker knows.
func (b *backup) pointInTime(ctx context.Context) PointInTime {
	kind := b.Instant.Kind()
	if b.epoch == nil || kind == PointInTimeNone || kind.heldStill() {
		return kind
	}
	// Another backup that ended an epoch meanwhile has taken the evidence.
	st, err := b.History.Status(ctx)
	late, peekErr := b.History.Peek(ctx)
	if err != nil || peekErr != nil || st.Epoch != b.epoch.Position.Epoch+1 || late.Count() > 0 {
		b.Warn(fmt.Errorf("%s may have been written to while it was read: the snapshot is not a point in time; the next backup has what changed", b.Device.Path()))
		return PointInTimeNone
	}
	return kind
}

// saveRoot stores device.json and the folders down to it.
func (b *backup) saveRoot(ctx context.Context, m *Manifest) (repo.ID, error) {
	raw, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return repo.ID{}, err
	}
	content, size, err := layer.SaveFile(ctx, b.w, append(raw, '\n'))
	if err != nil {
		return repo.ID{}, fmt.Errorf("save %s: %w", manifestFile, err)
	}
	nodes := []*repo.Node{
		layer.FileNode(manifestFile, content, size, b.Time),
		layer.DirNode(layersFolder, m.Layers, b.Time),
	}
	names := strings.Split(strings.Trim(b.Name, "/"), "/")
	for i := len(names) - 1; ; i-- {
		saved, err := b.w.SaveTree(ctx, &repo.Tree{Nodes: nodes})
		if err != nil || i < 0 {
			return saved.ID, err
		}
		nodes = []*repo.Node{layer.DirNode(names[i], saved.ID, b.Time)}
	}
}

// stored fills in what the repository grew by.
func (b *backup) stored(snapshotSize int64) {
	st := b.w.Stats()
	b.sum.DataAdded, b.sum.DataAddedPacked = st.Data.PlainBytes-b.forwarded, st.Data.StoredBytes-b.sum.CopiedForwardPacked
	b.sum.MetadataAddedPacked = st.Meta.StoredBytes + st.Tree.StoredBytes + st.IndexBytes + snapshotSize - b.sum.MergeAddedPacked
}

// CleanName makes the name of a device in a snapshot of a path.
func CleanName(path string) (string, error) {
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("name %q is not an absolute path", path)
	}
	for _, part := range strings.Split(strings.Trim(path, "/"), "/") {
		if part == "" || part == "." || part == ".." {
			return "", fmt.Errorf("name %q: a path without empty parts, . and .. is asked for", path)
		}
	}
	return "/" + strings.Trim(path, "/"), nil
}
