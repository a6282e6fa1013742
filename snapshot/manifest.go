// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// Tag marks our snapshots for people. Nothing depends on it: `restic tag` may
// remove it.
const Tag = "dsync"

// The names inside a device's folder.
const (
	manifestFile = "device.json"
	layersFolder = "layers"
)

const manifestVersion = 1

// Manifest is device.json: what was backed up, and how.
type Manifest struct {
	Version   int             `json:"version"`
	Device    string          `json:"device"` // the path that was opened
	Size      int64           `json:"size"`   // bytes
	BlockSize int             `json:"block_size"`
	Identity  device.Identity `json:"identity"`

	// Position is what the snapshot is complete up to; nil if no reliable
	// tracker watched.
	Position *kernel.Position `json:"position"`

	PointInTime PointInTime `json:"point_in_time"`

	Changes        Changes  `json:"changes"`
	FallbackReason string   `json:"fallback_reason,omitempty"`
	Parent         *repo.ID `json:"parent"` // for people only

	// SumKey is the key of all sums of the chain.
	SumKey SumKey `json:"sum_key"`

	// Generations say which layers hold what was written lately; nil if none do.
	Generations *Generations `json:"generations,omitempty"`

	// Layers is the ID of the tree beside this file. It tells a tree that
	// somebody repaired from the one that was written.
	Layers repo.ID `json:"layers"`
}

// PointInTime says how the image came to be one of a single instant.
type PointInTime string

// The ways.
const (
	// PointInTimeNone is no point in time: the device may have been written
	// while it was read.
	PointInTimeNone PointInTime = "none"
	// PointInTimeFreeze: every file system above was frozen.
	PointInTimeFreeze PointInTime = "freeze"
	// PointInTimePrecopy: it was copied in use, and what was written meanwhile
	// once more with every file system above frozen.
	PointInTimePrecopy PointInTime = "precopy"
	// PointInTimeDM: a device-mapper snapshot, taken while it was suspended.
	PointInTimeDM PointInTime = "dm"
	// PointInTimeLVM: a snapshot that LVM took.
	PointInTimeLVM PointInTime = "lvm"
	// PointInTimeUnmounted: nobody else had the device claimed, and so nobody
	// could mount it.
	PointInTimeUnmounted PointInTime = "unmounted"
	// PointInTimeReadOnly: it was mounted, but read-only.
	PointInTimeReadOnly PointInTime = "read-only"
	// PointInTimeFile: a plain file. Whoever writes to it meanwhile is not
	// noticed.
	PointInTimeFile PointInTime = "file"
)

// heldStill reports whether we saw to it that nobody wrote.
func (p PointInTime) heldStill() bool { return p.freezes() || p == PointInTimeLVM }

// freezes reports whether the device's writers wait from Begin to End: nothing
// of ours may then wait for the device.
func (p PointInTime) freezes() bool {
	return p == PointInTimeFreeze || p == PointInTimePrecopy || p == PointInTimeDM
}

// Changes is where a backup's dirty set came from.
type Changes string

// The sources of changes.
const (
	ChangesFull    Changes = "full"    // everything
	ChangesTracker Changes = "tracker" // the kernel's bitmaps
	ChangesCompare Changes = "compare" // the chain's sums
	ChangesRanges  Changes = "ranges"  // a list that the user gave
)

// SumKey is a key of block sums as JSON has it: 64 hex digits.
type SumKey blocksum.Key

// MarshalText writes hex digits.
func (k SumKey) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, k[:]), nil }

// UnmarshalText reads hex digits.
func (k *SumKey) UnmarshalText(b []byte) error {
	if len(b) != 2*len(k) {
		return fmt.Errorf("parse sum key: want %d hex digits", 2*len(k))
	}
	_, err := hex.Decode(k[:], b)
	return err
}

// Validate reports a manifest that this program must not use.
func (m *Manifest) Validate() error {
	switch {
	case m.Version > manifestVersion:
		return fmt.Errorf("format version %d of %s is newer than this program: update it", m.Version, manifestFile)
	case m.Version < 1 || m.Size < 0 || m.BlockSize != kernel.BlockSize:
		return fmt.Errorf("%w: %s says version %d, %d bytes in blocks of %d", layer.ErrDamaged, manifestFile, m.Version, m.Size, m.BlockSize)
	}
	return nil
}

// ParseManifest reads a device.json.
func ParseManifest(b []byte) (*Manifest, error) {
	m := new(Manifest)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("parse %s: %w: %w", manifestFile, layer.ErrDamaged, err)
	}
	return m, m.Validate()
}
