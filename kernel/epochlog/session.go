// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// ErrBroken says that what was written since a position is not known. The text
// that wraps it gives the reason in one line.
var ErrBroken = errors.New("the position cannot be bridged")

// ErrReverted says that a position is of the tracker's history and not in it: it
// was reached in a time that this machine has left by being reverted to an
// older state. What was written then may be on the device, and is marked nowhere.
var ErrReverted = errors.New("the machine was reverted to an older state")

// errUnlocked is a caller's mistake.
var errUnlocked = errors.New("the tracker's lock is not held")

// Session is one process's turn with a tracker: it rotates, logs and
// acknowledges under the tracker's lock. Its methods may be called from one
// goroutine at a time. The order of a backup is Open, Rotate, Since, Unlock,
// a long copy, Relock, Commit, Unlock.
type Session struct {
	tracker kernel.Tracker
	uuid    kernel.UUID
	log     log
	lock    *os.File // nil while unlocked

	rotated *kernel.Epoch    // by Rotate, and not known to be logged
	last    *kernel.Position // the newest rotation of this session, logged or not
}

// Open takes the tracker's lock, for which it waits until ctx is done, and logs
// and acknowledges the ended epoch that another process may have left. It
// writes to the state directory. The tracker stays the caller's.
func Open(ctx context.Context, t kernel.Tracker, stateDir string) (*Session, error) {
	st, err := t.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("open epoch log: %w", err)
	}
	s := &Session{tracker: t, uuid: st.UUID, log: logOf(stateDir, st.UUID)}
	if err := s.Relock(ctx); err != nil {
		return nil, err
	}
	if err := s.log.sweep(); err != nil {
		return nil, errors.Join(err, s.Unlock())
	}
	return s, nil
}

// Unlock lets other processes rotate the tracker, and must be called before
// anything that takes long. Unlocking twice is no error.
func (s *Session) Unlock() error {
	if s.lock == nil {
		return nil
	}
	err := s.lock.Close()
	s.lock = nil
	return err
}

// Relock takes the lock again and, as Open does, logs and acknowledges an ended
// epoch that it finds, this session's own among them.
func (s *Session) Relock(ctx context.Context) error {
	if s.lock != nil {
		return nil
	}
	lock, err := lockTracker(ctx, s.uuid)
	if err != nil {
		return err
	}
	s.lock = lock
	if err := s.settle(ctx); err != nil {
		return errors.Join(err, s.Unlock())
	}
	return nil
}

// settle logs and acknowledges the ended epoch that the kernel side holds.
func (s *Session) settle(ctx context.Context) error {
	e, err := s.tracker.Pending(ctx)
	if err != nil {
		return fmt.Errorf("look for an ended epoch: %w", err)
	}
	if e == nil {
		return nil
	}
	if e.Position.Tracker != s.uuid {
		return fmt.Errorf("look for an ended epoch: the tracker is %s now, no longer %s", e.Position.Tracker, s.uuid)
	}
	if err := s.log.write(*e); err != nil {
		return err
	}
	if err := s.tracker.Ack(ctx, e.Position.Epoch); err != nil {
		return fmt.Errorf("acknowledge epoch %d: %w", e.Position.Epoch, err)
	}
	return nil
}

// Rotate ends the running epoch under a new random nonce. It writes to no file,
// so that it may be called while file systems are frozen, and needs the lock.
// The epoch is logged by Commit; until then another Rotate fails with
// [kernel.ErrUnacknowledged].
func (s *Session) Rotate(ctx context.Context) (kernel.Epoch, error) {
	if s.lock == nil {
		return kernel.Epoch{}, fmt.Errorf("rotate: %w", errUnlocked)
	}
	if s.rotated != nil {
		return kernel.Epoch{}, fmt.Errorf("rotate: %w", kernel.ErrUnacknowledged)
	}
	e, err := s.tracker.Rotate(ctx, kernel.NewNonce())
	if err != nil {
		return kernel.Epoch{}, fmt.Errorf("rotate: %w", err)
	}
	if e.Position.Tracker != s.uuid {
		return kernel.Epoch{}, fmt.Errorf("rotate: the tracker is %s now, no longer %s", e.Position.Tracker, s.uuid)
	}
	s.rotated, s.last = &e, &e.Position
	return e, nil
}

// Commit logs what Rotate returned, makes it durable and acknowledges it. It
// needs the lock, and may be called again, also after a failure. An epoch that
// another process has logged meanwhile is done; if the log holds another one
// in its place, that is an error.
func (s *Session) Commit(ctx context.Context) error {
	if s.rotated == nil {
		return nil
	}
	if s.lock == nil {
		return fmt.Errorf("commit epoch %d: %w", s.rotated.Position.Epoch, errUnlocked)
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	p := s.rotated.Position
	have, err := s.log.read(p.Epoch)
	if err != nil {
		return fmt.Errorf("commit epoch %d: %w", p.Epoch, err)
	}
	if have.position != p {
		return fmt.Errorf("commit epoch %d: the log holds %s instead of %s", p.Epoch, have.position, p)
	}
	s.rotated = nil
	return nil
}

// Since unites every epoch after pos, up to the newest rotation of this
// session or, without one, to the newest that has ended. It needs no lock. Call
// it after Rotate: what was missed before the rotation is then known. An error
// that wraps [ErrBroken] means that the dirty set has to be found another way.
func (s *Session) Since(ctx context.Context, pos kernel.Position) (*kernel.Bitmap, error) {
	st, err := s.tracker.Status(ctx)
	if err != nil {
		return nil, err
	}
	if st.UUID != s.uuid || pos.Tracker != s.uuid {
		return nil, broken("it belongs to another history (%s) than the tracker's (%s): tracking was started afresh", pos.Tracker, st.UUID)
	}
	if !st.Reliable {
		return nil, broken("the tracker is not reliable: %s", st.Reason)
	}
	last := s.newest(st)
	if pos.Epoch > last {
		return nil, broken("epoch %d has not ended yet (%d is the last that has): %w", pos.Epoch, last, ErrReverted)
	}
	blocks, err := s.verify(pos)
	if err != nil {
		return nil, err
	}
	union := kernel.NewBitmap(blocks)
	for n := pos.Epoch + 1; n <= last; n++ {
		if union, err = s.addEpoch(union, n); err != nil {
			return nil, err
		}
	}
	return union, nil
}

// newest is the last epoch that counts as ended.
func (s *Session) newest(st kernel.Status) uint64 {
	if s.last != nil {
		return s.last.Epoch
	}
	return st.Epoch - 1
}

// Reverted is an [ErrReverted] if pos cannot be a position of this history,
// although it bears its UUID: its epoch has not ended, or ended with another
// nonce. That the log no longer has it proves nothing. It needs no lock; pos
// was read before Rotate, since another process may end epochs meanwhile.
func (s *Session) Reverted(ctx context.Context, pos kernel.Position) error {
	if pos.Tracker != s.uuid {
		return nil
	}
	st, err := s.tracker.Status(ctx)
	if err != nil {
		return err
	}
	if last := s.newest(st); st.UUID == s.uuid && pos.Epoch > last {
		return fmt.Errorf("epoch %d has not ended yet (%d is the last that has): %w", pos.Epoch, last, ErrReverted)
	}
	have, ok := s.log.position(pos.Epoch)
	if s.rotated != nil && s.rotated.Position.Epoch == pos.Epoch {
		have, ok = s.rotated.Position, true
	}
	if ok && have.Tracker == s.uuid && have.Epoch == pos.Epoch && have.Nonce != pos.Nonce {
		return fmt.Errorf("epoch %d has the nonce %s, not %s: %w", pos.Epoch, have.Nonce, pos.Nonce, ErrReverted)
	}
	return nil
}

// verify makes sure that pos is a position of this history, and tells how many
// blocks the device had at it.
func (s *Session) verify(pos kernel.Position) (blocks int64, err error) {
	have := kernel.Position{}
	if s.rotated != nil && s.rotated.Position.Epoch == pos.Epoch {
		have, blocks = s.rotated.Position, s.rotated.Bitmap.Blocks()
	} else {
		e, err := s.logged(pos.Epoch)
		if err != nil {
			return 0, err
		}
		have, blocks = e.position, e.blocks
	}
	if have != pos {
		return 0, broken("epoch %d has the nonce %s, not %s: %w", pos.Epoch, have.Nonce, pos.Nonce, ErrReverted)
	}
	return blocks, nil
}

// addEpoch unites an ended epoch, of this session or of the log, into b, or
// into a larger bitmap in its place where the device grew.
func (s *Session) addEpoch(b *kernel.Bitmap, n uint64) (*kernel.Bitmap, error) {
	if s.rotated != nil && s.rotated.Position.Epoch == n {
		b, err := grown(b, s.rotated.Bitmap.Blocks(), n)
		if err != nil {
			return nil, err
		}
		if err := b.Or(s.rotated.Bitmap); err != nil {
			return nil, broken("%w", err)
		}
		return b, nil
	}
	e, err := s.logged(n)
	if err != nil {
		return nil, err
	}
	if b, err = grown(b, e.blocks, n); err != nil {
		return nil, err
	}
	if err := e.addTo(b, e.payload); err != nil {
		return nil, broken("%w", err)
	}
	return b, nil
}

// grown gives a bitmap of as many blocks, in which what the device did not have
// before, and the block that may have been short, are marked. What a device
// that shrank has lost cannot be known: it may have grown again in between.
func grown(b *kernel.Bitmap, blocks int64, n uint64) (*kernel.Bitmap, error) {
	had := b.Blocks()
	if blocks < had {
		return nil, broken("the device had %d blocks in epoch %d, and %d before: it shrank", blocks, n, had)
	}
	if blocks == had {
		return b, nil
	}
	out := b.Grown(blocks)
	out.SetRange(max(had-1, 0), blocks-1)
	return out, nil
}

// logged finds an ended epoch of this history in the log.
func (s *Session) logged(n uint64) (entry, error) {
	e, err := s.log.read(n)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return entry{}, broken("epoch %d is not in the log %s", n, s.log.dir)
	case err != nil:
		return entry{}, broken("%w", err)
	case e.position.Tracker != s.uuid:
		return entry{}, broken("the log %s holds an epoch of the tracker %s", s.log.dir, e.position.Tracker)
	}
	return e, nil
}

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrBroken, fmt.Errorf(format, args...))
}
