// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Withdrawn are the saved states that may be those of a device which is about to
// be tracked, out of the state directory: nobody finds them any more, and whatever
// ends the caller, nothing brings them back.
type Withdrawn struct {
	stateDir string
	saved    []withdrawn
	others   []withdrawn // which have the same parts, and another identity
	why      error       // why another one, which may have been the device's, is none
}

type withdrawn struct {
	Saved
	name string // of the file by now
}

// Withdraw looks for the saved states of a device, by what is on it: names change
// from boot to boot. It comes before the new tracker is attached. If it came later,
// one that was attached by a start which was killed would see writes that an
// older state knows nothing of, and that state could still be found once
// the tracker is gone. One of Use, Drop or PutBack must follow;
// after Use, PutBack.
func Withdraw(ctx context.Context, stateDir string, src Source, size int64, id Identity) (*Withdrawn, error) {
	found, err := similar(ctx, stateDir, src, size, id)
	if err != nil {
		return nil, err
	}
	w := &Withdrawn{stateDir: stateDir, why: found.why}
	for i, list := range [][]Saved{found.saved, found.others} {
		for _, s := range list {
			name, err := w.take(s)
			switch {
			case errors.Is(err, os.ErrNotExist):
				w.why = errors.New("another process has taken its state meanwhile")
			case errors.Is(err, errOther):
				w.why = err
			case err != nil:
				return nil, errors.Join(fmt.Errorf("withdraw saved tracking: %w", err), w.PutBack())
			case i == 0:
				w.saved = append(w.saved, withdrawn{s, name})
			default:
				w.others = append(w.others, withdrawn{s, name})
			}
		}
	}
	return w, nil
}

// take renames a state's file, durably. Of several callers one succeeds.
func (w *Withdrawn) take(s Saved) (name string, err error) {
	dir := folder(w.stateDir, s.Last.Tracker)
	name = tempPrefix + "used-" + kernel.NewNonce().String()
	if err := os.Rename(filepath.Join(dir, fileName), filepath.Join(dir, name)); err != nil {
		return "", err
	}
	have, err := read(dir, name)
	if err != nil || have.Nonce != s.Nonce {
		// What is not understood is not used again.
		return "", errors.Join(errOther, err, os.Remove(filepath.Join(dir, name)), syncDir(dir))
	}
	return name, syncDir(dir)
}

var errOther = errors.New("another state was saved meanwhile")

// Match compares the device with the states that were withdrawn. The new tracker
// watches the device by now, so that no write falls between, and the caller holds
// it. Without a state that fits, the error wraps [ErrNotSaved] and says why.
func (w *Withdrawn) Match(ctx context.Context, src Source, size int64) (Saved, error) {
	var fits []Saved
	why := w.why
	for _, s := range w.saved {
		now, err := Take(ctx, src, size, s.Fingerprint.Key)
		if err != nil {
			return Saved{}, err
		}
		if err := s.Fingerprint.Compare(now); err != nil {
			why = err
			continue
		}
		fits = append(fits, s.Saved)
	}
	switch {
	case len(fits) == 1:
		return fits[0], nil
	case len(fits) > 1:
		why = fmt.Errorf("both %s and %s fit", fits[0].Last.Tracker, fits[1].Last.Tracker)
	case why == nil:
		why = errNoneSaved
	}
	return Saved{}, fmt.Errorf("%w: %w", ErrNotSaved, why)
}

var errNoneSaved = errors.New("no state of this device was saved")

// None reports that there was nothing that could have been the device's.
func (w *Withdrawn) None() bool { return len(w.saved) == 0 && w.why == nil }

// Use uses up the state that Match gave, and what else could have been the
// device's: it is gone when Use returns.
func (w *Withdrawn) Use() error { return w.each(&w.saved, removeFile) }

// Drop removes all of them: a new history begins, and no older one may fit again
// when it has ended.
func (w *Withdrawn) Drop() error {
	return errors.Join(w.each(&w.saved, removeFile), w.each(&w.others, removeFile))
}

// PutBack undoes Withdraw, but for what was used: no tracker was attached, or
// what is left is another device's.
func (w *Withdrawn) PutBack() error {
	return errors.Join(w.each(&w.saved, putBack), w.each(&w.others, putBack))
}

// each does it once to every file of a list.
func (w *Withdrawn) each(list *[]withdrawn, do func(dir, name string) error) error {
	var errs []error
	all := *list
	*list = nil
	for _, s := range all {
		dir := folder(w.stateDir, s.Last.Tracker)
		if err := errors.Join(do(dir, s.name), syncDir(dir)); err != nil {
			errs = append(errs, fmt.Errorf("use saved tracking: %w", err))
		}
	}
	return errors.Join(errs...)
}

func removeFile(dir, name string) error { return os.Remove(filepath.Join(dir, name)) }

// putBack never takes the place of a state that was saved since.
func putBack(dir, name string) error {
	return unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, name), unix.AT_FDCWD, filepath.Join(dir, fileName), unix.RENAME_NOREPLACE)
}

// Discard removes every saved state that could be the device's.
func Discard(ctx context.Context, stateDir string, src Source, size int64, id Identity) error {
	w, err := Withdraw(ctx, stateDir, src, size, id)
	if err != nil {
		return err
	}
	return w.Drop()
}

// candidates are the saved states that may be a device's.
type candidates struct {
	saved  []Saved
	others []Saved // which have the same parts, and another identity
	why    error   // why another one, which may have been the device's, is none
}

// similar finds the states of devices of the same size with the same parts, or with
// an identity that agrees, or, of a device on which nothing can be told apart, just
// of the same size, unless the identity says that it is another one.
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
		field, another := s.Identity.contradicts(id)
		known := !another && s.Identity.agrees(id)
		if d.reason == "" && !known && !s.Fingerprint.resembles(now) {
			continue
		}
		if another {
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
