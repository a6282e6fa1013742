// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Find looks for the saved state of a device that is being started, by what is
// on it: names change from boot to boot. The new tracker watches the device
// already, so that no write falls between, and the caller holds the device. The
// state must be [Consume]d before it is trusted. Without one, the error wraps
// [ErrNotSaved] and says why; a state that was the device's and cannot be used
// is removed, since it never can be again.
func Find(ctx context.Context, stateDir string, src Source, size int64, id Identity) (Saved, error) {
	found, err := similar(ctx, stateDir, src, size, id)
	if err != nil {
		return Saved{}, err
	}
	var fits []Saved
	why := found.why
	for _, s := range found.saved {
		now, err := Take(ctx, src, size, s.Fingerprint.Key)
		if err != nil {
			return Saved{}, err
		}
		if err := s.Fingerprint.Compare(now); err != nil {
			if err := remove(stateDir, s.Last.Tracker); err != nil {
				return Saved{}, err
			}
			why = err
			continue
		}
		fits = append(fits, s)
	}
	switch {
	case len(fits) == 1:
		return fits[0], nil
	case len(fits) > 1:
		for _, s := range fits {
			if err := remove(stateDir, s.Last.Tracker); err != nil {
				return Saved{}, err
			}
		}
		why = fmt.Errorf("both %s and %s fit", fits[0].Last.Tracker, fits[1].Last.Tracker)
	case why == nil:
		why = errors.New("no state of this device was saved")
	}
	return Saved{}, fmt.Errorf("%w: %w", ErrNotSaved, why)
}

// Discard removes every saved state that could be the device's. Whoever starts a
// new history calls it before the first write: otherwise an older state could
// fit again once that history has ended.
func Discard(ctx context.Context, stateDir string, src Source, size int64, id Identity) error {
	found, err := similar(ctx, stateDir, src, size, id)
	if err != nil {
		return err
	}
	for _, s := range append(found.saved, found.others...) {
		if err := remove(stateDir, s.Last.Tracker); err != nil {
			return err
		}
	}
	return nil
}

// candidates are the saved states that may be a device's.
type candidates struct {
	saved  []Saved
	others []Saved // which have the same parts, and another identity
	why    error   // why another one, which may have been the device's, is none
}

// similar finds the states of devices of the same size with the same parts, or,
// of a device on which nothing can be told apart, just of the same size, unless
// the identity says that it is another one.
func similar(ctx context.Context, stateDir string, src Source, size int64, id Identity) (c candidates, err error) {
	folders, err := os.ReadDir(filepath.Join(stateDir, "trackers"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return c, fmt.Errorf("look for saved tracking: %w", err)
	}
	var all []Saved
	for _, f := range folders {
		var u kernel.UUID
		if !f.IsDir() || u.UnmarshalText([]byte(f.Name())) != nil {
			continue
		}
		s, err := read(folder(stateDir, u), fileName)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			c.why = err
		case s.Fingerprint.Size == size:
			all = append(all, s)
		}
	}
	if len(all) == 0 {
		return c, nil // the device need not be read
	}
	now := Fingerprint{Size: size}
	parts, err := layout(ctx, src, size)
	var d doubt
	if err != nil && !errors.As(err, &d) {
		return c, fmt.Errorf("look for saved tracking: %w", err)
	}
	for _, p := range parts {
		now.Parts = append(now.Parts, p.Part)
	}
	for _, s := range all {
		if d.reason == "" && !s.Fingerprint.resembles(now) {
			continue
		}
		if field, yes := s.Identity.contradicts(id); yes {
			c.why = fmt.Errorf("what was saved as %s has another %s", s.Device, field)
			if d.reason == "" {
				c.others = append(c.others, s)
			}
			continue
		}
		c.saved = append(c.saved, s)
	}
	return c, nil
}

// remove takes a saved state away, durably. None is no error.
func remove(stateDir string, u kernel.UUID) error {
	dir := folder(stateDir, u)
	if err := os.Remove(filepath.Join(dir, fileName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove saved tracking: %w", err)
	}
	return syncDir(dir)
}
