// SPDX-License-Identifier: BSD-2-Clause

// Package retry is a decorator that tries again what a network or a server
// failed at.
//
// It promises that an error it returns is either one that no retry can mend,
// or has been there for the whole budget. It waits between the tries for
// exponentially growing, randomly varied times. It knows nothing of why a call
// failed beyond what package backend's errors say.
package retry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// DefaultBudget is restic's.
const DefaultBudget = 15 * time.Minute

// Options of the decorator; the zero value is usable.
type Options struct {
	// Budget is for how long a call is tried again, counted from its start; 0:
	// DefaultBudget, negative: never. A call that took longer than that gets
	// one more try all the same.
	Budget time.Duration

	FirstWait time.Duration // before the second try; 0: 500 ms
	MaxWait   time.Duration // between two tries, at most; 0: one minute

	Logger *slog.Logger // told of each retry once, at level warn; nil: nobody
}

// Backend decorates another one.
type Backend struct {
	backend.Backend
	o Options
}

// New decorates be.
func New(be backend.Backend, o Options) *Backend {
	if o.Budget == 0 {
		o.Budget = DefaultBudget
	}
	if o.FirstWait <= 0 {
		o.FirstWait = 500 * time.Millisecond
	}
	if o.MaxWait <= 0 {
		o.MaxWait = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Backend{be, o}
}

// Unwrap is the decorated store.
func (b *Backend) Unwrap() backend.Backend { return b.Backend }

// final reports an error that another try would only repeat.
func final(err error) bool {
	return errors.Is(err, backend.ErrPermanent) || errors.Is(err, backend.ErrNotExist) || errors.Is(err, backend.ErrExist)
}

// callerError is what the caller's own fn returned. It is final.
type callerError struct{ err error }

func (e callerError) Error() string { return e.err.Error() }
func (e callerError) Unwrap() error { return e.err }

// do calls op until it succeeds, fails for good, or the budget is used up. It
// tells op the number of the try, from 1 on.
func (b *Backend) do(ctx context.Context, what string, op func(try int) error) error {
	start := time.Now()
	waits := backoff.ExponentialBackOff{
		InitialInterval: b.o.FirstWait, MaxInterval: b.o.MaxWait, Multiplier: 2, RandomizationFactor: 0.5,
	}
	for try := 1; ; try++ {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		err := op(try)
		if err == nil || final(err) || errors.As(err, new(callerError)) {
			return err
		}
		if cerr := ctx.Err(); cerr != nil {
			return interrupted(cerr, err)
		}
		wait := waits.NextBackOff()
		if b.o.Budget < 0 || try > 1 && time.Since(start)+wait > b.o.Budget {
			return gaveUp(err, try, time.Since(start))
		}
		b.o.Logger.WarnContext(ctx, "trying again", "call", what, "error", err, "try", try, "wait", wait.Round(time.Millisecond))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return interrupted(ctx.Err(), err)
		}
	}
}

// interrupted is the context's error, with what had failed before.
func interrupted(cerr, err error) error {
	if errors.Is(err, cerr) {
		return err
	}
	return fmt.Errorf("%w (after: %w)", cerr, err)
}

func gaveUp(err error, tries int, d time.Duration) error {
	if tries == 1 {
		return err
	}
	return fmt.Errorf("%w (tried %d times in %s)", err, tries, d.Round(time.Second))
}

// Create tries again.
func (b *Backend) Create(ctx context.Context) error {
	return b.do(ctx, "create repository", func(int) error { return b.Backend.Create(ctx) })
}

// Save tries again. When an earlier try of ours may have stored the config
// file although its answer got lost, the file found is compared.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	return b.do(ctx, "save "+h.String(), func(try int) error {
		err := b.Backend.Save(ctx, h, data)
		if try > 1 && errors.Is(err, backend.ErrExist) {
			return b.compare(ctx, h, data, err)
		}
		return err
	})
}

// compare reports exists unless the stored file is data.
func (b *Backend) compare(ctx context.Context, h backend.Handle, data []byte, exists error) error {
	var same bool
	err := b.Backend.Load(ctx, h, 0, 0, func(r io.Reader) error {
		stored, err := io.ReadAll(r)
		same = bytes.Equal(stored, data)
		return err
	})
	if err == nil && !same {
		return exists
	}
	return err
}

// Load tries again, unless the error came from fn alone.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.do(ctx, "load "+h.String(), func(int) error {
		return b.Backend.Load(ctx, h, length, offset, func(r io.Reader) error {
			watched := &backend.WatchedReader{R: r}
			err := fn(watched)
			if err != nil && watched.Err == nil {
				return callerError{err}
			}
			return err
		})
	})
}

// Stat tries again.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (fi backend.FileInfo, err error) {
	err = b.do(ctx, "stat "+h.String(), func(int) error {
		fi, err = b.Backend.Stat(ctx, h)
		return err
	})
	return fi, err
}

// List tries again, unless the error came from fn, and leaves out the names
// that fn has seen.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	seen := map[string]bool{}
	return b.do(ctx, "list "+t.String()+" files", func(int) error {
		return b.Backend.List(ctx, t, func(fi backend.FileInfo) error {
			if seen[fi.Name] {
				return nil
			}
			seen[fi.Name] = true
			if err := fn(fi); err != nil {
				return callerError{err}
			}
			return nil
		})
	})
}

// Remove tries again. A file that is missing after a failed try was removed by
// that try.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	return b.do(ctx, "remove "+h.String(), func(try int) error {
		err := b.Backend.Remove(ctx, h)
		if try > 1 && errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		return err
	})
}
