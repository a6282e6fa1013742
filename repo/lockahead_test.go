// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"errors"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
)

// slowLocker stores a lock only after something else has happened.
type slowLocker struct {
	backend.Backend
	meanwhile func()
}

func (b *slowLocker) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if meanwhile := b.meanwhile; h.Type == backend.LockFile && meanwhile != nil {
		b.meanwhile = nil
		meanwhile()
	}
	return b.Backend.Save(ctx, h, data)
}

// TestNothingIsReadAheadUnderALockThatTookLong: while our lock is on its way to a slow store,
// somebody takes an exclusive one, looks twice and sees nobody. What we would read then may be
// what they are about to delete.
func TestNothingIsReadAheadUnderALockThatTookLong(t *testing.T) {
	for _, c := range []struct {
		name string
		ends bool // before our lock can be seen
	}{{"StillAtWork", false}, {"Done", true}} {
		t.Run(c.name, func(t *testing.T) {
			other, dir := newRepo(t, Options{})
			be, err := local.Open(dir, local.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer be.Close()
			slow := &slowLocker{Backend: be}
			r, err := Open(t.Context(), slow, testPassword, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			var exclusive *Lock
			slow.meanwhile = func() {
				var err error
				if exclusive, err = other.Lock(t.Context(), true, 0); err != nil {
					t.Errorf("an exclusive lock beside one that is not there yet: %v", err)
				} else if c.ends {
					if err := exclusive.Unlock(); err != nil {
						t.Error(err)
					}
				}
			}
			l, err := r.LockAhead(t.Context())
			if c.ends {
				if err != nil {
					t.Fatal(err)
				}
				if l.settling != nil {
					t.Error("reading begins before the second look")
				}
				if err := l.Settled(t.Context()); err != nil {
					t.Error(err)
				}
				if err := l.Unlock(); err != nil {
					t.Error(err)
				}
			} else if !errors.Is(err, ErrLocked) {
				t.Errorf("a lock beside an exclusive one: %v", err)
			}
			if err := exclusive.Unlock(); err != nil {
				t.Error(err)
			}
			if names := lockNames(t, dir); len(names) != 0 {
				t.Errorf("left: %v", names)
			}
		})
	}
}
