// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// Rotate writes out the mapped device's page cache and ends the running epoch;
// see [kernel.Tracker]. The cache of a suspended device is left alone, since
// writing it out would wait for the resume: what is dirty in it is marked when
// it comes through, in the new epoch.
func (t *Tracker) Rotate(ctx context.Context, nonce kernel.Nonce) (kernel.Epoch, error) {
	r, err := t.look(ctx)
	if err != nil {
		return kernel.Epoch{}, err
	}
	if r.pending {
		return kernel.Epoch{}, fmt.Errorf("rotate epoch %d: %w", r.epoch, kernel.ErrUnacknowledged)
	}
	info, err := devmapper.Stat(r.name)
	if err != nil {
		return kernel.Epoch{}, err
	}
	if !info.Suspended {
		if err := syncCache(t.dev); err != nil {
			return kernel.Epoch{}, err
		}
	}
	err = t.message(r, "rotate", nonce.String())
	if errors.Is(err, unix.EBUSY) {
		return kernel.Epoch{}, fmt.Errorf("rotate epoch %d: %w", r.epoch, kernel.ErrUnacknowledged)
	}
	if err != nil {
		return kernel.Epoch{}, err
	}
	e, err := t.Pending(ctx)
	if err != nil {
		return kernel.Epoch{}, err
	}
	if e == nil || e.Position.Nonce != nonce {
		return kernel.Epoch{}, fmt.Errorf("rotate epoch %d: another process has taken it", r.epoch)
	}
	return *e, nil
}

// syncCache writes out the dirty pages of a device's own page cache. It flushes
// no drive's cache: a read of the device sees what is in that.
func syncCache(dev uint64) error {
	d, err := describe(dev)
	if err != nil {
		return err
	}
	return d.sync()
}

func syncNode(node string) error {
	f, err := os.Open(node)
	if err != nil {
		return fmt.Errorf("sync page cache of %s: %w", node, err)
	}
	const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	err = unix.SyncFileRange(int(f.Fd()), 0, 0, flags)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("sync page cache of %s: %w", node, err)
	}
	return nil
}

// Pending is the ended epoch that waits for Ack, or nil.
func (t *Tracker) Pending(ctx context.Context) (*kernel.Epoch, error) {
	r, err := t.look(ctx)
	if err != nil || !r.pending {
		return nil, err
	}
	b, err := t.frozen(r)
	if err != nil {
		return nil, err
	}
	after, err := t.look(ctx)
	if err != nil {
		return nil, err
	}
	if !after.pending || after.pendingEpoch != r.pendingEpoch || after.pendingNonce != r.pendingNonce {
		return nil, fmt.Errorf("read epoch %d of %s: another process has acknowledged it meanwhile", r.pendingEpoch, t.Device())
	}
	p := kernel.Position{Tracker: r.uuid, Epoch: r.pendingEpoch, Nonce: r.pendingNonce}
	return &kernel.Epoch{Position: p, Bitmap: b}, nil
}

func (t *Tracker) frozen(r record) (*kernel.Bitmap, error) {
	b := kernel.NewBitmap(r.pendingBlocks)
	if err := addBits(r.dir, fileFrozen, b); err != nil {
		return nil, err
	}
	// The module counts for itself; a seek or a read that left something out
	// would show.
	if n := b.Count(); n != r.pendingDirty {
		return nil, fmt.Errorf("read epoch %d of %s: %d blocks instead of %d", r.pendingEpoch, t.Device(), n, r.pendingDirty)
	}
	return b, nil
}

// Ack lets the module forget the ended epoch with that number.
func (t *Tracker) Ack(ctx context.Context, epoch uint64) error {
	r, err := t.look(ctx)
	if err != nil {
		return err
	}
	if !r.pending || r.pendingEpoch != epoch {
		return nil
	}
	err = t.message(r, "ack", strconv.FormatUint(epoch, 10))
	if errors.Is(err, unix.ENODATA) {
		return nil // another process did
	}
	return err
}

// peekTries is how often Peek begins anew when an epoch ended meanwhile.
const peekTries = 10

// Peek copies what the running epoch has marked so far.
func (t *Tracker) Peek(ctx context.Context) (*kernel.Bitmap, error) {
	for range peekTries {
		r, err := t.look(ctx)
		if err != nil {
			return nil, err
		}
		b := kernel.NewBitmap(r.blocks)
		if err := addBits(r.dir, fileActive, b); errors.Is(err, errChanged) {
			continue
		} else if err != nil {
			return nil, err
		}
		after, err := t.look(ctx)
		if err != nil {
			return nil, err
		}
		if r.epoch == after.epoch && r.blocks == after.blocks {
			return b, nil
		}
	}
	return nil, fmt.Errorf("peek at %s: its epochs end faster than they can be read", t.Device())
}

// Invalidate makes the tracker unreliable from now on. The first reason stays.
func (t *Tracker) Invalidate(ctx context.Context, reason string) error {
	r, err := t.look(ctx)
	if err != nil {
		return err
	}
	if reason == "" {
		return errors.New("invalidate tracker: no reason given")
	}
	return t.message(r, "invalidate", quote(reason))
}

// quote makes text of any kind into words of a message: device-mapper splits
// at white space and takes what follows a backslash as it is.
func quote(text string) string {
	clean := strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, text)
	return strings.ReplaceAll(strings.Join(strings.Fields(clean), " "), `\`, `\\`)
}

// Mark marks a range of the device as written in the running epoch. Both are
// bytes; blocks that are touched count whole.
func (t *Tracker) Mark(ctx context.Context, e kernel.Extent) error {
	if err := e.Validate(t.size); err != nil {
		return fmt.Errorf("mark on %s: %w", t.Device(), err)
	}
	r, err := t.look(ctx)
	if err != nil {
		return err
	}
	first, end := e.Offset/sectorSize, (e.End()+sectorSize-1)/sectorSize
	return t.message(r, "mark", strconv.FormatInt(first, 10), strconv.FormatInt(end-first, 10))
}

// Rebase announces that the next table which is made live may have another
// device beneath, or another offset (in sectors), with equal content. Without
// it the history becomes unreliable then.
func (t *Tracker) Rebase(ctx context.Context, path string, offset uint64) error {
	dev, err := blockDevice(path)
	if err != nil {
		return err
	}
	r, err := t.look(ctx)
	if err != nil {
		return err
	}
	return t.message(r, "rebase", devString(dev), strconv.FormatUint(offset, 10))
}

// Continue takes up a saved history, in which epoch is the one to run now: the
// caller vouches that nothing was written to the device since the one before
// ended. It works on a history in which nothing has happened yet; unix.EBUSY
// otherwise.
func (t *Tracker) Continue(ctx context.Context, uuid kernel.UUID, epoch uint64) error {
	r, err := t.look(ctx)
	if err != nil {
		return err
	}
	if err := t.message(r, "continue", uuid.String(), strconv.FormatUint(epoch, 10)); err != nil {
		return err
	}
	t.uuid = uuid
	return nil
}

// Restart begins a new history of the mapped device, which may be in use: with
// a new UUID, and reliable. If another process has done so since the tracker
// was opened, it takes that one. What the old history marked is forgotten.
func (t *Tracker) Restart(ctx context.Context) error {
	unlock, err := lockAll(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := find(t.dev, t.dir)
	if errors.Is(err, errNoHistory) {
		return fmt.Errorf("restart tracker %s of %s: %w", t.uuid, t.Device(), kernel.ErrNotTracked)
	}
	if err != nil {
		return err
	}
	if r.uuid == t.uuid {
		if err := t.message(r, "restart"); err != nil {
			return err
		}
		if r, err = find(t.dev, r.dir); err != nil {
			return err
		}
		if r.uuid == t.uuid {
			return fmt.Errorf("restart tracker %s of %s: the module kept its history", t.uuid, t.Device())
		}
	}
	*t = *newTracker(r)
	return nil
}
