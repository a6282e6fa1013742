// SPDX-License-Identifier: BSD-2-Clause

package trackers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/bpf"
	"github.com/dsync-backup/dsync-backup/kernel/dm"
)

// Tracker is a tracker of any kind.
type Tracker interface {
	kernel.Tracker

	// UUID names the tracker's history.
	UUID() kernel.UUID
	// Device is the node by which the device is to be used.
	Device() string
	// Size is the device's size in bytes when the tracker was opened.
	Size() int64
	// Stop ends the history. The tracker is closed, unless it fails.
	Stop(ctx context.Context) error
	// StopQuiet is Stop, and says why something may have been written to the
	// device in the running epoch, or missed: "" if nothing was.
	StopQuiet(ctx context.Context) (why string, err error)
	// Continue takes up a saved history in place of this one, of which no epoch
	// has ended: epoch is the one that runs now. The caller holds the locks of
	// both (package epochlog).
	Continue(ctx context.Context, uuid kernel.UUID, epoch uint64) error
}

var (
	_ Tracker = (*bpf.Tracker)(nil)
	_ Tracker = (*dm.Tracker)(nil)
)

// Kind is a kind of tracker.
type Kind string

// The kinds. Auto takes DM where the module is there and the device can be
// claimed, else BPF.
const (
	Auto Kind = "auto"
	DM   Kind = "dm"
	BPF  Kind = "bpf"
)

// Open finds the tracker of a device: [kernel.ErrNotTracked] if there is none.
// The path may also be that of the device beneath a mapped one; [Instead] tells.
func Open(path string) (Tracker, error) {
	d, dmErr := dm.Open(path)
	if dmErr == nil && !beneath(d, path) {
		return d, nil
	}
	b, bpfErr := bpf.Open(path)
	switch {
	case bpfErr == nil:
		return b, nil
	case dmErr == nil:
		return d, nil
	case errors.Is(dmErr, kernel.ErrNotTracked) && errors.Is(bpfErr, kernel.ErrNotTracked):
		return nil, bpfErr
	case errors.Is(dmErr, kernel.ErrNotTracked) && bpf.Supported() != nil:
		return nil, dmErr // what does not run here watches nothing
	case errors.Is(dmErr, kernel.ErrNotTracked):
		return nil, bpfErr
	case errors.Is(bpfErr, kernel.ErrNotTracked) || bpf.Supported() != nil:
		return nil, dmErr
	}
	return nil, errors.Join(dmErr, bpfErr)
}

// beneath reports whether the path leads to the device beneath, not to the
// mapped one.
func beneath(d *dm.Tracker, path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) != nil || st.Rdev != d.Dev()
}

// Instead names the mapped device that is to be used in place of the device at
// a path, because it tracks what is written; "" if there is none.
func Instead(path string) string {
	d, err := dm.Open(path)
	if err != nil || !beneath(d, path) {
		return ""
	}
	return d.Device()
}

// List opens every tracker of this machine. With an error, what it returns is
// all that could be found.
func List() ([]Tracker, error) {
	var out []Tracker
	dms, dmErr := dm.List()
	for _, t := range dms {
		out = append(out, t)
	}
	bpfs, bpfErr := bpf.List()
	for _, t := range bpfs {
		out = append(out, t)
	}
	if bpfErr != nil && bpf.Supported() != nil {
		bpfErr = nil
	}
	return out, errors.Join(dmErr, bpfErr)
}

// Options tune Start.
type Options struct {
	Kind Kind   // default: Auto
	Name string // of the mapped device that DM makes; see [dm.Options]

	// Warn is told why Auto could not take DM although the module is there.
	Warn func(error)
}

// Start begins a new history of a device. It fails if the device is tracked
// already, or is of a kind that cannot be tracked.
func Start(ctx context.Context, path string, o Options) (Tracker, error) {
	if err := CheckUntracked(path); err != nil {
		return nil, err
	}
	switch o.Kind {
	case BPF:
		return startBPF(ctx, path)
	case DM:
		return startDM(ctx, path, o)
	case Auto, "":
	default:
		return nil, fmt.Errorf("tracker %q is not one of auto, dm, bpf", o.Kind)
	}
	err := dm.Supported()
	if err == nil {
		var t Tracker
		if t, err = startDM(ctx, path, o); err == nil || !errors.Is(err, dm.ErrInUse) {
			return t, err
		}
	}
	if o.Warn != nil && !errors.Is(err, dm.ErrNoModule) {
		o.Warn(fmt.Errorf("not tracked with the kernel module: %w", err))
	}
	return startBPF(ctx, path)
}

// CheckUntracked is an error if the device has a tracker.
func CheckUntracked(path string) error {
	old, err := Open(path)
	if err != nil {
		return nil //nolint:nilerr // there is none, or Start says why it cannot be asked
	}
	defer old.Close()
	return fmt.Errorf("track %s: it is tracked already, as %s (%s): run `track stop` first", path, old.Device(), old.UUID())
}

// startDM and startBPF keep a nil pointer from becoming a Tracker that is not
// nil.
func startDM(ctx context.Context, path string, o Options) (Tracker, error) {
	t, err := dm.Start(ctx, path, dm.Options{Name: o.Name})
	if err != nil {
		return nil, err
	}
	return t, nil
}

func startBPF(ctx context.Context, path string) (Tracker, error) {
	t, err := bpf.Start(ctx, path, bpf.Options{})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Renew ends a history that cannot be trusted and begins another of the same
// kind, while the device is in use. Another process may do the same at the same
// time; then both get the one new history. The path is one to the device. On
// an error the tracker is closed.
func Renew(ctx context.Context, t Tracker, path string) (Tracker, error) {
	switch t := t.(type) {
	case *dm.Tracker:
		if err := t.Restart(ctx); err != nil {
			return nil, errors.Join(err, t.Close())
		}
		return t, nil
	case *bpf.Tracker:
		return renewBPF(ctx, t, path)
	}
	return nil, fmt.Errorf("renew tracker of %s: its kind is not known", t.Device())
}

func renewBPF(ctx context.Context, old *bpf.Tracker, path string) (Tracker, error) {
	err := old.Stop(ctx)
	if errors.Is(err, kernel.ErrNotTracked) {
		return renewed(ctx, path)
	}
	if err != nil {
		return nil, fmt.Errorf("end the tracker that missed something: %w", err)
	}
	t, err := startBPF(ctx, path)
	if err != nil {
		if other, openErr := bpf.Open(path); openErr == nil {
			return other, nil
		}
		return nil, fmt.Errorf("track %s afresh: %w", path, err)
	}
	return t, nil
}

// renewPatience is how long another process may take to begin what it renews.
const renewPatience = 5 * time.Second

// renewed waits for the history that another process begins, which has ended the
// one before. If that process has stopped tracking, none may be begun: it may
// have saved the history, which would then be taken up behind this one.
func renewed(ctx context.Context, path string) (Tracker, error) {
	for end := time.Now().Add(renewPatience); ; {
		other, err := bpf.Open(path)
		if err == nil {
			return other, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("tracking of %s was stopped meanwhile: %w", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
