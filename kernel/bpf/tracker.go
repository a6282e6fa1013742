// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Options tune Start; the zero value is fine.
type Options struct {
	// SettleTimeout is how long Start waits until no write from before it is
	// in flight; default 10 s. Past it tracking goes on, and every epoch that
	// ends before that is so counts as wholly dirty.
	SettleTimeout time.Duration

	hook func(point string)     // tests crash here
	skip func(name string) bool // tests leave programs out
}

// Tracker is one tracked device: open descriptors of its pinned objects. It
// implements [kernel.Tracker].
type Tracker struct {
	dir    string
	uuid   kernel.UUID
	target target
	maps   [mapCount]*ebpf.Map
	broken string // of another version, or with maps missing: only Status and Stop work
	hook   func(point string)
	ended  *kernel.Epoch // the one to be acknowledged, if this process has read it
}

var _ kernel.Tracker = (*Tracker)(nil)

// Start begins a new history of a device, which may be named by a symbolic
// link. It fails if the device is tracked already, or is of a kind that cannot
// be tracked.
func Start(ctx context.Context, device string, o Options) (*Tracker, error) {
	if o.hook == nil {
		o.hook = func(string) {}
	}
	if o.skip == nil {
		o.skip = func(string) bool { return false }
	}
	if o.SettleTimeout == 0 {
		o.SettleTimeout = 10 * time.Second
	}
	if err := available(); err != nil {
		return nil, err
	}
	t, err := resolve(device)
	if err != nil {
		return nil, err
	}
	if err := t.refuse(); err != nil {
		return nil, err
	}
	if err := mountBPFFS(); err != nil {
		return nil, err
	}
	tr, err := start(ctx, t, o)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, o.SettleTimeout)
	defer cancel()
	if err := tr.waitSettled(ctx); err != nil {
		return nil, errors.Join(err, tr.Close())
	}
	return tr, nil
}

func start(ctx context.Context, t target, o Options) (*Tracker, error) {
	unlock, err := lockPins(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	dir := pinDir(t.dev)
	switch old, err := openDir(dir); {
	case err == nil:
		defer old.Close()
		return nil, fmt.Errorf("track %s: it is tracked already (%s): run `track stop` first", t.path(), old.uuid)
	case !errors.Is(err, kernel.ErrNotTracked):
		return nil, err
	}
	if err := removePins(dir); err != nil {
		return nil, err
	}
	tr, err := build(t, dir, o)
	if err != nil {
		return nil, errors.Join(err, removePins(dir))
	}
	return tr, nil
}

// build makes, pins and attaches everything, the state last to say so.
func build(t target, dir string, o Options) (*Tracker, error) {
	_ = rlimit.RemoveMemlock() // only kernels before 5.11 charge it
	coll, err := load(t)
	if err != nil {
		return nil, err
	}
	defer coll.Close()
	s := newState(t)
	stateMap := coll.Maps[objectMapState]
	if err := storeState(stateMap, s); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make pinned tracker: %w", err)
	}
	o.hook("made folder")
	if err := pinMaps(coll, dir, &s); err != nil {
		return nil, err
	}
	o.hook("pinned maps")
	if err := attach(t, coll, dir, &s, o); err != nil {
		return nil, err
	}
	if t.mapped {
		if err := noteStack(coll, t); err != nil {
			return nil, err
		}
	}
	// What was looked up before the attachment may have been replaced since.
	if now, err := describe(t.dev); err != nil || now != t {
		return nil, fmt.Errorf("track %s: the device changed meanwhile: try again", t.path())
	}
	s.Step = stepIdle
	if err := storeState(stateMap, s); err != nil {
		return nil, err
	}
	o.hook("started")
	tr, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	tr.hook = o.hook
	return tr, nil
}

// Open finds the tracker of a device: [kernel.ErrNotTracked] if there is none.
// It also clears away what a crashed start or stop left behind.
func Open(device string) (*Tracker, error) {
	dev, err := deviceNumber(device)
	if errors.Is(err, os.ErrNotExist) {
		return openGone(device, err)
	}
	if err != nil {
		return nil, err
	}
	tr, err := openDir(pinDir(dev))
	if errors.Is(err, kernel.ErrNotTracked) {
		sweep(pinDir(dev))
		return nil, fmt.Errorf("open tracker of %s: %w", device, err)
	}
	return tr, err
}

// openGone finds the tracker of a device that is no longer there, by its name.
func openGone(device string, cause error) (*Tracker, error) {
	all, err := List()
	if err != nil {
		return nil, err
	}
	var found *Tracker
	for _, tr := range all {
		if found == nil && tr.target.path() == device {
			found = tr
			continue
		}
		_ = tr.Close()
	}
	if found == nil {
		return nil, cause
	}
	return found, nil
}

// List opens every tracker of this machine, in the order of device numbers.
func List() ([]*Tracker, error) {
	entries, err := os.ReadDir(pinRoot)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list trackers: %w", err)
	}
	var out []*Tracker
	for _, e := range entries {
		tr, err := openDir(filepath.Join(pinRoot, e.Name()))
		if errors.Is(err, kernel.ErrNotTracked) {
			sweep(filepath.Join(pinRoot, e.Name()))
			continue
		}
		if err != nil {
			for _, tr := range out {
				_ = tr.Close()
			}
			return nil, err
		}
		out = append(out, tr)
	}
	return out, nil
}

// sweep removes the remains of a crashed start or stop, unless some process is
// starting or stopping a tracker now.
func sweep(dir string) {
	if !exists(dir) {
		return
	}
	unlock, err := tryLockPins()
	if err != nil {
		return
	}
	defer unlock()
	if tr, err := openDir(dir); err == nil {
		_ = tr.Close()
	} else if errors.Is(err, kernel.ErrNotTracked) {
		_ = removePins(dir)
	}
}

// openDir opens the pinned objects of a tracker, if its state says that it is
// one.
func openDir(dir string) (*Tracker, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinState), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, kernel.ErrNotTracked
	}
	if err != nil {
		return nil, fmt.Errorf("open pinned tracker %s: %w", dir, err)
	}
	tr := &Tracker{dir: dir, hook: func(string) {}}
	tr.maps[0] = m
	s, err := loadState(m)
	if errors.Is(err, errNoState) || err == nil && (s.Step == stepStarting || s.Step == stepStopping) {
		_ = tr.Close()
		return nil, kernel.ErrNotTracked
	}
	tr.uuid, tr.target = s.UUID, s.target()
	if err != nil {
		tr.broken = err.Error() + afresh
	} else if s.Version != stateVersion {
		tr.broken = "it was started by another version of dsync-backup" + afresh
	}
	if tr.broken != "" {
		tr.target = targetOfDir(dir)
		return tr, nil
	}
	for i, name := range mapNames[1:] {
		if tr.maps[i+1], err = ebpf.LoadPinnedMap(filepath.Join(dir, name), nil); err != nil {
			tr.broken = fmt.Sprintf("its pinned map %s is gone", name) + afresh
			break
		}
	}
	return tr, nil
}

// targetOfDir guesses the device of a tracker whose state cannot be read, for
// messages.
func targetOfDir(dir string) target {
	var d devno
	if _, err := fmt.Sscanf(filepath.Base(dir), "%d-%d", &d.major, &d.minor); err == nil {
		if t, err := describe(d); err == nil {
			return t
		}
	}
	return target{name: filepath.Base(dir), dev: d}
}

// UUID names the tracker's history.
func (t *Tracker) UUID() kernel.UUID { return t.uuid }

// Device is the node of the tracked device.
func (t *Tracker) Device() string { return t.target.path() }

// Size is the tracked device's size in bytes when tracking began.
func (t *Tracker) Size() int64 { return t.target.size() }

// Close lets go of the tracker; tracking goes on.
func (t *Tracker) Close() error {
	var errs []error
	for i, m := range t.maps {
		if m != nil {
			errs = append(errs, m.Close())
			t.maps[i] = nil
		}
	}
	return errors.Join(errs...)
}

// checkPinned makes sure that the state which is pinned is the one held here,
// and not that of a later tracker of the same device.
func (t *Tracker) checkPinned() error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(t.dir, pinState), nil)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("look for tracker %s: %w", t.uuid, kernel.ErrNotTracked)
	}
	if err != nil {
		return fmt.Errorf("look for tracker %s: %w", t.uuid, err)
	}
	defer m.Close()
	s, err := loadState(m)
	if err != nil || s.UUID != t.uuid {
		return fmt.Errorf("look for tracker %s: another one has its place: %w", t.uuid, kernel.ErrNotTracked)
	}
	return nil
}

func (t *Tracker) stateMap() *ebpf.Map     { return t.maps[0] }
func (t *Tracker) verdictMap() *ebpf.Map   { return t.maps[1] }
func (t *Tracker) activeMap() *ebpf.Map    { return t.maps[2] }
func (t *Tracker) bits(i uint32) *ebpf.Map { return t.maps[3+i] }
func (t *Tracker) raisedMap() *ebpf.Map    { return t.maps[5] }
func (t *Tracker) settledMap() *ebpf.Map   { return t.maps[6] }
func (t *Tracker) inflightMap() *ebpf.Map  { return t.maps[7] }
func (t *Tracker) swapsMap() *ebpf.Map     { return t.maps[8] }
func (t *Tracker) stackMap() *ebpf.Map     { return t.maps[9] }
