// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Stop ends the history: it detaches the programs and removes all that is
// pinned. Another process that still holds the tracker finds it unreliable.
// The tracker is closed.
func (t *Tracker) Stop(ctx context.Context) error {
	unlock, err := lockPins(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := t.checkPinned(); err != nil {
		return errors.Join(err, t.Close())
	}
	if err := t.takeOff(); err != nil {
		return err
	}
	return t.Close()
}

// StopQuiet is Stop, and looks afterwards whether anything was written in the
// running epoch, or missed: why says so, and is empty if nothing was.
func (t *Tracker) StopQuiet(ctx context.Context) (why string, err error) {
	unlock, err := lockPins(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := t.checkPinned(); err != nil {
		return "", errors.Join(err, t.Close())
	}
	s, err := t.usable(ctx)
	if err == nil {
		why, err = t.judge(s)
	}
	if err != nil {
		return "", err
	}
	if err := t.takeOff(); err != nil {
		return "", err
	}
	// The maps are still held here.
	b := kernel.NewBitmap(t.target.blocks())
	var raised uint64
	err = errors.Join(t.add(b, 0), t.add(b, 1), t.raisedMap().Lookup(uint32(0), &raised), t.Close())
	switch {
	case err != nil:
		return "", fmt.Errorf("look at what was written at the end: %w", err)
	case why != "":
	case raised != 0:
		why = flagReason(raised)
	case b.Count() > 0 || s.Step != stepIdle:
		why = fmt.Sprintf("%d blocks were written while tracking was stopped", b.Count())
	}
	return why, nil
}

// takeOff detaches the programs and removes all that is pinned. The caller holds
// the lock.
func (t *Tracker) takeOff() error {
	if t.broken == "" {
		if err := t.setVerdict("tracking was stopped"); err != nil {
			return err
		}
	}
	t.hook("told stop")
	if s, err := loadState(t.stateMap()); err == nil {
		s.Step = stepStopping
		if err := storeState(t.stateMap(), s); err != nil {
			return err
		}
	}
	t.hook("stopping")
	return removePins(t.dir)
}

// Continue takes up a saved history, in which epoch is the one to run now: the
// caller vouches that nothing was written to the device since the one before
// ended but what is marked here by now, and holds the locks of both trackers. It
// works on a reliable history that has settled and in which no epoch has ended.
func (t *Tracker) Continue(ctx context.Context, uuid kernel.UUID, epoch uint64) error {
	unlock, err := lockPins(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := t.checkPinned(); err != nil {
		return err
	}
	s, err := t.usable(ctx)
	if err != nil {
		return err
	}
	no := func(why string) error { return fmt.Errorf("continue tracker %s on %s: %s", uuid, t.Device(), why) }
	if s.Step != stepIdle || s.Epoch != 1 || epoch < 2 {
		return no("an epoch has ended already")
	}
	if reason, err := t.judge(s); err != nil {
		return err
	} else if reason != "" {
		return no(reason)
	}
	if ok, err := t.settled(); err != nil {
		return err
	} else if !ok {
		return no("writes from before its start are still in flight")
	}
	s.UUID, s.Epoch = uuid, epoch
	if err := storeState(t.stateMap(), s); err != nil {
		return err
	}
	t.uuid = uuid
	return nil
}
