// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// usable reads the state of a tracker that all operations work on.
func (t *Tracker) usable(ctx context.Context) (state, error) {
	if err := ctx.Err(); err != nil {
		return state{}, err
	}
	if t.broken != "" {
		return state{}, fmt.Errorf("use tracker of %s: %s", t.Device(), t.broken)
	}
	s, err := loadState(t.stateMap())
	if err != nil {
		return state{}, err
	}
	if s.Step == stepStarting || s.Step == stepStopping {
		return state{}, fmt.Errorf("use tracker of %s: %w", t.Device(), kernel.ErrNotTracked)
	}
	if s.UUID != t.uuid {
		return state{}, fmt.Errorf("use tracker %s of %s: another history (%s) has its place: %w", t.uuid, t.Device(), s.UUID, kernel.ErrNotTracked)
	}
	return s, nil
}

// Rotate syncs the device's page cache and ends the running epoch; see
// [kernel.Tracker].
func (t *Tracker) Rotate(ctx context.Context, nonce kernel.Nonce) (kernel.Epoch, error) {
	s, err := t.usable(ctx)
	if err != nil {
		return kernel.Epoch{}, err
	}
	if s, err = t.recover(s); err != nil {
		return kernel.Epoch{}, err
	}
	if s.Step == stepPending {
		return kernel.Epoch{}, fmt.Errorf("rotate epoch %d: %w", s.Epoch, kernel.ErrUnacknowledged)
	}
	if err := syncCaches(t.target); err != nil {
		return kernel.Epoch{}, err
	}
	settled, err := t.settled()
	if err != nil {
		return kernel.Epoch{}, err
	}
	s.Step, s.Nonce, s.PendingAll = stepRotating, nonce, 1
	if settled {
		s.PendingAll = 0
	}
	if err := storeState(t.stateMap(), s); err != nil {
		return kernel.Epoch{}, err
	}
	t.hook("rotating")
	if s, err = t.swap(s); err != nil {
		return kernel.Epoch{}, err
	}
	return t.pendingEpoch(s)
}

// swap carries out a rotation that the state announces, from wherever it was
// left.
func (t *Tracker) swap(s state) (state, error) {
	next := 1 - s.Active
	// On return no program that could still see the old bitmap is running:
	// the kernel waits for an RCU grace period (maybe_wait_bpf_programs), and
	// the programs run under rcu_read_lock.
	if err := t.activeMap().Put(uint32(0), t.bits(next)); err != nil {
		return state{}, fmt.Errorf("swap bitmaps: %w", err)
	}
	t.hook("swapped")
	if err := t.carryOver(t.bits(next)); err != nil {
		return state{}, err
	}
	t.hook("carried over")
	s.Step, s.PendingEpoch, s.Epoch, s.Active = stepPending, s.Epoch, s.Epoch+1, next
	if err := storeState(t.stateMap(), s); err != nil {
		return state{}, err
	}
	t.hook("pending")
	return s, nil
}

// recover finishes what a crash interrupted. A rotation that was announced and
// whose swap did not happen is taken back: nobody was told of it. One whose
// swap did happen is carried through, with the nonce that it had; the grace
// period and the carrying over are done again, since it is not known whether
// they were.
func (t *Tracker) recover(s state) (state, error) {
	switch s.Step {
	case stepRotating:
		swapped, err := t.isActive(1 - s.Active)
		if err != nil {
			return state{}, err
		}
		if swapped {
			return t.swap(s)
		}
		s.Step = stepIdle
		return s, storeState(t.stateMap(), s)
	case stepClearing:
		return t.wipe(s)
	}
	return s, nil
}

func (t *Tracker) isActive(i uint32) (bool, error) {
	var id ebpf.MapID
	if err := t.activeMap().Lookup(uint32(0), &id); err != nil {
		return false, fmt.Errorf("read which bitmap is active: %w", err)
	}
	want, err := mapID(t.bits(i))
	return id == want, err
}

// Pending is the ended epoch that waits for Ack, or nil.
func (t *Tracker) Pending(ctx context.Context) (*kernel.Epoch, error) {
	s, err := t.usable(ctx)
	if err != nil {
		return nil, err
	}
	if s, err = t.recover(s); err != nil {
		return nil, err
	}
	if s.Step != stepPending {
		t.ended = nil // another process has acknowledged it
		return nil, nil
	}
	e, err := t.pendingEpoch(s)
	if err != nil {
		return nil, err
	}
	return &e, nil
}

// pending is the position at which the ended epoch ends.
func (s state) pending() kernel.Position {
	return kernel.Position{Tracker: s.UUID, Epoch: s.PendingEpoch, Nonce: s.Nonce}
}

// hasRead reports whether this process has the ended epoch's bitmap.
func (t *Tracker) hasRead(s state) bool { return t.ended != nil && t.ended.Position == s.pending() }

// pendingEpoch reads the ended epoch, but for one that this process has read: nothing
// marks blocks in it any more.
func (t *Tracker) pendingEpoch(s state) (kernel.Epoch, error) {
	if t.hasRead(s) {
		return *t.ended, nil
	}
	b := kernel.NewBitmap(t.target.blocks())
	if s.PendingAll != 0 {
		b.SetRange(0, b.Blocks()-1)
	} else if err := t.add(b, 1-s.Active); err != nil {
		return kernel.Epoch{}, err
	}
	t.ended = &kernel.Epoch{Position: s.pending(), Bitmap: b}
	return *t.ended, nil
}

// Ack lets go of the ended epoch with that number: its bitmap is wiped for the
// next rotation.
func (t *Tracker) Ack(ctx context.Context, epoch uint64) error {
	s, err := t.usable(ctx)
	if err != nil {
		return err
	}
	if s, err = t.recover(s); err != nil {
		return err
	}
	if s.Step != stepPending || s.PendingEpoch != epoch {
		t.ended = nil
		return nil
	}
	s.Step = stepClearing
	if err := storeState(t.stateMap(), s); err != nil {
		return err
	}
	t.hook("clearing")
	_, err = t.wipe(s)
	return err
}

func (t *Tracker) wipe(s state) (state, error) {
	var err error
	if t.hasRead(s) {
		err = wipeWords(t.bits(1-s.Active), t.ended.Bitmap)
	} else {
		err = wipeMap(t.bits(1 - s.Active))
	}
	if err != nil {
		return state{}, err
	}
	t.ended = nil
	t.hook("cleared")
	s.Step, s.PendingEpoch, s.PendingAll, s.Nonce = stepIdle, 0, 0, kernel.Nonce{}
	return s, storeState(t.stateMap(), s)
}

// Peek copies what the running epoch has marked so far.
func (t *Tracker) Peek(ctx context.Context) (*kernel.Bitmap, error) {
	s, err := t.usable(ctx)
	if err != nil {
		return nil, err
	}
	b := kernel.NewBitmap(t.target.blocks())
	if s.Step == stepRotating { // by whom, and how far, is not known here
		err = t.add(b, 1-s.Active)
	}
	return b, errors.Join(err, t.add(b, s.Active))
}

// add unites one of the kernel side's bitmaps into b.
func (t *Tracker) add(b *kernel.Bitmap, i uint32) error {
	return addMap(b, t.bits(i))
}
