// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"context"
	"errors"
)

// ErrNotTracked says that no tracker watches the device.
var ErrNotTracked = errors.New("device is not tracked")

// ErrUnacknowledged says that an ended epoch waits for Ack, so that no further
// one can end.
var ErrUnacknowledged = errors.New("an ended epoch has not been acknowledged")

// Epoch is an ended epoch: every block that may have been written in it, and
// the position that its end is. Nobody changes its bitmap: the tracker may have it, too.
type Epoch struct {
	Position Position
	Bitmap   *Bitmap
}

// Status is what a tracker says of itself; its JSON is the contract of
// `track status --json`.
type Status struct {
	Device      string `json:"device"`
	Below       string `json:"below,omitempty"` // dm: the device beneath Device
	Tracker     string `json:"tracker"`         // "bpf" or "dm"
	UUID        UUID   `json:"uuid"`
	Epoch       uint64 `json:"epoch"` // the running one; the first is 1
	BlockSize   int    `json:"block_size"`
	DirtyBlocks int64  `json:"dirty_blocks"` // of Tracker.Dirty; 0 until it was asked
	Reliable    bool   `json:"reliable"`
	Reason      string `json:"reason,omitempty"` // why it is not reliable
}

// Tracker watches one device. Its methods may be called from one goroutine at
// a time; between processes the caller holds the tracker's lock (package
// epochlog) around Rotate, Pending and Ack.
type Tracker interface {
	// Status also looks at whether the device is still the one that was
	// attached, and whether anything was missed. It changes nothing but the
	// reliable flag, which never turns true again within one UUID. What it costs
	// does not grow with the device.
	Status(ctx context.Context) (Status, error)

	// Dirty counts the blocks that are marked in the running epoch and in one not
	// yet acknowledged, each once, in time that may grow with the device. Of a
	// history that is no longer there it is 0.
	Dirty(ctx context.Context) (int64, error)

	// Rotate ends the running epoch: from its return on, every write that is
	// submitted, and every one that completes, is marked in the next epoch.
	// The kernel side keeps the ended epoch, over the death of this process
	// too, until it is acknowledged. It writes nothing to a file system other
	// than bpffs, so it may be called while file systems are frozen. With an
	// epoch still unacknowledged it fails with ErrUnacknowledged.
	Rotate(ctx context.Context, nonce Nonce) (Epoch, error)

	// Pending is the ended epoch that waits for Ack, or nil.
	Pending(ctx context.Context) (*Epoch, error)

	// Ack lets the kernel side forget the ended epoch with that number. The
	// caller has made it durable. Acknowledging one that is no longer pending
	// is not an error.
	Ack(ctx context.Context, epoch uint64) error

	// Peek copies what the running epoch has marked so far.
	Peek(ctx context.Context) (*Bitmap, error)

	// Invalidate makes the tracker unreliable from now on, and says why.
	Invalidate(ctx context.Context, reason string) error

	// Close lets go of the tracker; tracking goes on.
	Close() error
}
