// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"time"

	"github.com/dsync-backup/dsync-backup/snapshot/device"
)

// Instant makes the device stand still.
type Instant interface {
	// Kind is how.
	Kind() PointInTime
	// Begin makes it stand still. The context that it returns ends, with the
	// cause, when the device no longer does. From Begin to End nothing may be
	// written to a file system but through the repository's backend.
	Begin(ctx context.Context) (context.Context, error)
	// End lets it go and says for how long it stood still. It may be called
	// again, and then does nothing.
	End() (time.Duration, error)
}

// Settler is an Instant that can write out beforehand what Begin would have to
// write out first, while the device is in use. What is left to copy is then
// known before the device stands still.
type Settler interface {
	Instant
	Settle(ctx context.Context) error
}

// Snapshotter is an Instant that keeps what the device held on another device,
// which is read while the original goes on. The calls come in this order:
//
//	if Atomic:  Begin, [an epoch ends], Take, End, Watch, [reads], Check, Drop
//	otherwise:         [an epoch ends], Take, [another one ends], Watch, [reads], Check, Drop
//
// Drop is called in any case, also after a Begin or a Take that failed.
//
// If Atomic, nothing is written to the device between Begin and End: the epoch
// that ended is exactly what the snapshot is complete up to. Otherwise Take
// finds a moment of its own between the two ends. All that was written up to
// the second is copied, and the snapshot is recorded as complete up to the
// first: the next backup copies what was written around Take once more.
type Snapshotter interface {
	Instant
	// Atomic says whether Begin makes the device stand still until End. If
	// not, neither is called.
	Atomic() bool
	// Take makes the snapshot, of the size of the device.
	Take(ctx context.Context) (*device.Device, error)
	// Watch returns a context that also ends, with the cause, once the
	// snapshot no longer holds what the device held: its space was used up.
	Watch(ctx context.Context) context.Context
	// Check is called after the last read: an error says that what was read
	// may not be what the device held.
	Check(ctx context.Context) error
	// Drop removes the snapshot.
	Drop() error
}

// Still is the Instant of a device that stands still by itself, or of one that
// does not and of which no point in time is asked.
type Still PointInTime

// Kind implements Instant.
func (s Still) Kind() PointInTime { return PointInTime(s) }

// Begin implements Instant.
func (s Still) Begin(ctx context.Context) (context.Context, error) { return ctx, nil }

// End implements Instant.
func (s Still) End() (time.Duration, error) { return 0, nil }
