// SPDX-License-Identifier: BSD-2-Clause

// Package faulty is a decorator that makes a real store fail on command, for
// tests of what stands above it.
//
// The contract:
//
//   - Every call is counted per operation, from 1 on, whether it fails or not,
//     and is matched against the rules in the order they were added. All that
//     match are counted as having matched; the first that fires decides.
//   - A rule fires on matching calls Skip+1 to Skip+Times (Times 0: on all
//     after Skip), and of those on each Every-th only.
//   - A rule that fires first waits for Delay (or until ctx is done), then
//     does one of: Before, the call is not passed on; After, the call is
//     passed on, and its success is turned into Err (the answer that got
//     lost); Truncate, a Load whose reader fails with Err after Keep bytes, a
//     List that fails so after Keep names, or a Save that fails so when it has
//     stored the first Keep bytes under the file's own name, as a store that
//     is not atomic may; none of them, the call goes on, just late.
//   - With a Rate the bytes of a Save or a Load pass no faster than that, and
//     a Save or a Load that waits for its turn ends when ctx is done.
//   - A limit of [Backend.SetSpace] and the switch of [Backend.Kill] come
//     before all rules, and a bad place of [Backend.Break] after them.
//   - Location, Connections and Close never fail.
//
// It is for many goroutines; which of several calls at a time is the n-th is
// then up to chance. It never changes the data that passes; Truncate cuts it.
package faulty

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// Op is a set of operations.
type Op uint8

// The operations of a store.
const (
	Save Op = 1 << iota
	Load
	Stat
	List
	Remove
	Create
	Any = Save | Load | Stat | List | Remove | Create
)

// ErrInjected is the error of a rule that names none. A retry may mend it.
var ErrInjected = errors.New("injected fault")

// ErrThrottled is what a store says that wants fewer calls (503 and 429 in
// HTTP): use it as a rule's Err. A retry may mend it.
var ErrThrottled = fmt.Errorf("slow down: %w", ErrInjected)

// ErrNoSpace is the permanent error of a store that is full.
var ErrNoSpace = backend.Permanent(fmt.Errorf("the store is full: %w", syscall.ENOSPC))

// Where says at which point of a call the rule strikes.
type Where uint8

// The points of a call.
const (
	Nowhere  Where = iota // it only waits
	Before                // instead of the call
	After                 // the call is done, its success is hidden
	Truncate              // in the middle: Save, Load and List only
)

// Rule says which calls fail and how.
type Rule struct {
	Ops   Op
	Types []backend.FileType // nil: all
	Skip  int                // so many matching calls pass first
	Times int                // then so many are in range; 0: all
	Every int                // each so-manieth in range is hit; 0: each

	Delay time.Duration
	Rate  int64 // bytes per second of a Save or a Load; 0: no limit
	Where Where
	Keep  int64 // Truncate: bytes or names that come before the error
	Err   error // nil: ErrInjected

	matched int
}

// Backend decorates another one.
type Backend struct {
	be backend.Backend

	mu     sync.Mutex
	rules  []*Rule
	counts map[Op]int
	struck int
	space  int64 // bytes left; negative: no limit
	dead   error // nil: alive
	broken map[backend.Handle]badPlace
}

// badPlace is a byte of a file that cannot be read.
type badPlace struct {
	offset int64
	err    error
}

// New decorates be. Without rules it changes nothing.
func New(be backend.Backend) *Backend {
	return &Backend{be: be, counts: map[Op]int{}, space: -1, broken: map[backend.Handle]badPlace{}}
}

// Inject adds a rule.
func (b *Backend) Inject(r Rule) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.Err == nil {
		r.Err = ErrInjected
	}
	r.matched = 0
	b.rules = append(b.rules, &r)
}

// Heal drops all rules and limits and brings the store back.
func (b *Backend) Heal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rules, b.space, b.dead, b.struck = nil, -1, nil, 0
	clear(b.broken)
}

// Break gives a file a bad place: a Load that comes to the byte at offset fails
// there with err.
func (b *Backend) Break(h backend.Handle, offset int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.broken[h] = badPlace{offset, err}
}

// bad is the bad place in length bytes (0: up to the end) from offset on.
func (b *Backend) bad(h backend.Handle, length int, offset int64) (badPlace, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, ok := b.broken[h]
	return p, ok && p.offset >= offset && (length == 0 || p.offset < offset+int64(length))
}

// Struck is the number of calls since the last Heal that a rule, a limit or Kill hit.
func (b *Backend) Struck() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.struck
}

// SetSpace lets so many more bytes be saved; a Save that needs more fails with
// ErrNoSpace and stores nothing. Remove gives nothing back.
func (b *Backend) SetSpace(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.space = bytes
}

// Kill makes the store fail every call from now on, with err (nil:
// ErrInjected). Calls that are under way are not disturbed.
func (b *Backend) Kill(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.dead = err; err == nil {
		b.dead = ErrInjected
	}
}

// Count is the number of calls of these operations so far.
func (b *Backend) Count(ops Op) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for op, c := range b.counts {
		if op&ops != 0 {
			n += c
		}
	}
	return n
}

// strike counts the call and picks the rule that hits it, or nil.
func (b *Backend) strike(op Op, t backend.FileType, size int) (*Rule, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.counts[op]++
	if b.dead != nil {
		b.struck++
		return nil, b.dead
	}
	if op == Save && b.space >= 0 {
		if int64(size) > b.space {
			b.struck++
			return nil, ErrNoSpace
		}
		b.space -= int64(size)
	}
	var hit *Rule
	for _, r := range b.rules {
		if r.Ops&op == 0 || len(r.Types) > 0 && !slices.Contains(r.Types, t) {
			continue
		}
		r.matched++
		if hit == nil && r.fires() {
			hit = r
			b.struck++
		}
	}
	return hit, nil
}

// fires says whether the rule hits its last matching call.
func (r *Rule) fires() bool {
	n := r.matched - r.Skip
	return n > 0 && (r.Times == 0 || n <= r.Times) && n%max(r.Every, 1) == 0
}

// do runs a call under the rules. It passes on a Truncate rule.
func (b *Backend) do(ctx context.Context, op Op, t backend.FileType, size int, call func(*Rule) error) error {
	r, err := b.strike(op, t, size)
	if err != nil || r == nil {
		if err == nil {
			err = call(nil)
		}
		return err
	}
	if err := sleep(ctx, r.Delay); err != nil {
		return err
	}
	if r.Where == Before {
		return r.Err
	}
	err = call(r)
	if err == nil && r.Where == After {
		err = r.Err
	}
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pass waits for as long as n bytes take under the rule.
func (r *Rule) pass(ctx context.Context, n int) error {
	if r == nil || r.Rate <= 0 {
		return nil
	}
	return sleep(ctx, time.Duration(n)*time.Second/time.Duration(r.Rate))
}

// Location is the decorated store's.
func (b *Backend) Location() string { return b.be.Location() }

// Connections is the decorated store's.
func (b *Backend) Connections() int { return b.be.Connections() }

// Close closes the decorated store.
func (b *Backend) Close() error { return b.be.Close() }

// Unwrap is the decorated store.
func (b *Backend) Unwrap() backend.Backend { return b.be }

// Create is under the rules.
func (b *Backend) Create(ctx context.Context) error {
	return b.do(ctx, Create, 0, 0, func(*Rule) error { return b.be.Create(ctx) })
}

// Save is under the rules.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	return b.do(ctx, Save, h.Type, len(data), func(r *Rule) error {
		cut := r != nil && r.Where == Truncate
		if cut {
			data = data[:min(r.Keep, int64(len(data)))]
		}
		err := r.pass(ctx, len(data))
		if err == nil {
			err = b.be.Save(ctx, h, data)
		}
		if err == nil && cut {
			err = r.Err
		}
		return err
	})
}

// Load is under the rules.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.do(ctx, Load, h.Type, 0, func(r *Rule) error {
		return b.be.Load(ctx, h, length, offset, func(rd io.Reader) error {
			if p, ok := b.bad(h, length, offset); ok {
				rd = &brokenReader{rd, p.offset - offset, p.err}
			}
			if r != nil && r.Where == Truncate {
				rd = &brokenReader{rd, r.Keep, r.Err}
			}
			if r != nil && r.Rate > 0 {
				rd = &slowReader{ctx, rd, r}
			}
			return fn(rd)
		})
	})
}

// brokenReader fails after so many bytes.
type brokenReader struct {
	r    io.Reader
	keep int64
	err  error
}

func (b *brokenReader) Read(p []byte) (int, error) {
	if b.keep <= 0 {
		return 0, b.err
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.keep)])
	b.keep -= int64(n)
	return n, err
}

// slowReader gives a little at a time.
type slowReader struct {
	ctx  context.Context
	r    io.Reader
	rule *Rule
}

func (s *slowReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p[:min(len(p), 32<<10)])
	if werr := s.rule.pass(s.ctx, n); werr != nil {
		return 0, werr
	}
	return n, err
}

// Stat is under the rules.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (fi backend.FileInfo, err error) {
	err = b.do(ctx, Stat, h.Type, 0, func(*Rule) error {
		fi, err = b.be.Stat(ctx, h)
		return err
	})
	return fi, err
}

// List is under the rules.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	return b.do(ctx, List, t, 0, func(r *Rule) error {
		if r == nil || r.Where != Truncate {
			return b.be.List(ctx, t, fn)
		}
		left := r.Keep
		err := b.be.List(ctx, t, func(fi backend.FileInfo) error {
			if left--; left < 0 {
				return r.Err
			}
			return fn(fi)
		})
		if err == nil {
			err = r.Err
		}
		return err
	})
}

// Remove is under the rules.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	return b.do(ctx, Remove, h.Type, 0, func(*Rule) error { return b.be.Remove(ctx, h) })
}
