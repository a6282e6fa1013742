// SPDX-License-Identifier: BSD-2-Clause

package check

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// Finding is a snapshot that is damaged.
type Finding struct {
	Snapshot repo.ID         `json:"snapshot_id"`
	Device   string          `json:"device,omitempty"`
	Size     int64           `json:"device_size,omitempty"` // bytes
	Ranges   []kernel.Extent `json:"ranges"`                // of the device that cannot be given, in whole blocks
	Causes   []string        `json:"causes"`                // the first ones
}

// maxCauses is how many causes a finding names.
const maxCauses = 3

func (f *Finding) because(err error) {
	text := err.Error()
	if len(f.Causes) < maxCauses && !slices.Contains(f.Causes, text) {
		f.Causes = append(f.Causes, text)
	}
}

const shownRanges = 8

func (f Finding) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "snapshot %s", f.Snapshot.Str())
	if f.Device != "" {
		fmt.Fprintf(&b, " of %s", f.Device)
	}
	switch {
	case f.Device == "":
		b.WriteString(" is damaged")
	case len(f.Ranges) == 0:
		b.WriteString(" is damaged, and its device can be restored")
	default:
		b.WriteString(" cannot give bytes ")
	}
	for i, e := range f.Ranges[:min(len(f.Ranges), shownRanges)] {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%d to %d", e.Offset, e.End()-1)
	}
	if n := len(f.Ranges) - shownRanges; n > 0 {
		fmt.Fprintf(&b, " and %d more ranges", n)
	}
	if len(f.Ranges) > 0 {
		fmt.Fprintf(&b, " (%d of %d bytes)", kernel.TotalLength(f.Ranges), f.Size)
	}
	fmt.Fprintf(&b, ": %s", strings.Join(f.Causes, "; "))
	return b.String()
}

// Options say what to look at.
type Options struct {
	Snapshots map[repo.ID]*repo.Snapshot
	// Touched are the snapshots that need something which is damaged, and why.
	Touched map[repo.ID]error
	// Blob says why a blob cannot be had, or nil.
	Blob func(repo.BlobHandle) error
	// Alive is asked before a snapshot is called damaged: its error, that of a store
	// which does not answer any more, ends the check. It may be nil.
	Alive    func(context.Context) error
	Report   func(Finding)
	Progress func(done, total int64) // of snapshots; may be nil
}

// checker remembers what several snapshots share.
type checker struct {
	Options
	from   snapshot.Store
	parts  map[repo.ID]part
	layers map[repo.ID]*shape
}

// shape is what is kept in mind of a layer.
type shape struct {
	parts []part // in device order
	whole int64  // up to where it has everything, from 0 on
	err   error
}

// Devices checks every snapshot and reports those that are damaged, in the order
// of their IDs. It says how many devices it found. The error is about a check
// that could not be finished.
func Devices(ctx context.Context, from snapshot.Store, o Options) (devices int, err error) {
	c := &checker{Options: o, from: from, parts: map[repo.ID]part{}, layers: map[repo.ID]*shape{}}
	ids := make([]repo.ID, 0, len(o.Snapshots))
	for id := range o.Snapshots {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, repo.ID.Compare)
	for i, id := range ids {
		if o.Progress != nil {
			o.Progress(int64(i), int64(len(ids)))
		}
		n, err := c.snapshot(ctx, id, o.Snapshots[id])
		if err != nil {
			return devices, fmt.Errorf("check snapshot %s: %w", id.Str(), err)
		}
		devices += n
	}
	return devices, nil
}

// snapshot checks the devices of one snapshot.
func (c *checker) snapshot(ctx context.Context, id repo.ID, sn *repo.Snapshot) (int, error) {
	devices, err := snapshot.Devices(ctx, c.from, id, sn)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	touched := c.Touched[id]
	if repaired := (*snapshot.RepairedError)(nil); errors.As(err, &repaired) {
		return 1, c.repaired(ctx, repaired, touched)
	}
	if err != nil {
		f := Finding{Snapshot: id, Ranges: []kernel.Extent{}}
		switch {
		case !errors.Is(err, snapshot.ErrNoDevice):
			f.because(fmt.Errorf("it cannot be read: %w", err))
		case slices.Contains(sn.Tags, snapshot.Tag):
			f.because(fmt.Errorf("it has the tag %s, and holds no device: its folder was lost, or emptied by a repair", snapshot.Tag))
		case touched == nil:
			return 0, nil // files, all of them there
		}
		if touched != nil {
			f.because(touched)
		}
		return 0, c.report(ctx, f)
	}
	for _, d := range devices {
		f, err := c.device(ctx, d, touched != nil)
		if err != nil {
			return 0, err
		}
		if touched != nil && len(devices) == 1 {
			f.because(touched)
		}
		if len(f.Causes) == 0 {
			continue
		}
		if err := c.report(ctx, f); err != nil {
			return 0, err
		}
	}
	return len(devices), nil
}

// repaired reports a device of which another program made something else. Nothing of it is
// certain, since a layer may be gone without a trace; what is seen to be missing from the
// layers that are there says where it was damaged.
func (c *checker) repaired(ctx context.Context, why *snapshot.RepairedError, touched error) error {
	d, m := why.Device, *why.Device.Manifest
	f := Finding{Snapshot: d.Snapshot, Device: d.Name, Size: m.Size, Ranges: []kernel.Extent{{Length: m.Size}}}
	f.because(why)
	if touched != nil {
		f.because(touched)
	}
	m.Layers, d.Manifest = why.Layers, &m
	seen, err := c.device(ctx, d, true)
	if err != nil {
		return err
	}
	for _, text := range seen.Causes {
		f.because(errors.New(text))
	}
	return c.report(ctx, f)
}

func (c *checker) report(ctx context.Context, f Finding) error {
	if c.Alive != nil {
		if err := c.Alive(ctx); err != nil {
			return fmt.Errorf("%w; %s", err, strings.Join(f.Causes, "; "))
		}
	}
	c.Report(f)
	return nil
}

// device checks one device.
func (c *checker) device(ctx context.Context, d snapshot.Device, touched bool) (Finding, error) {
	f := Finding{Snapshot: d.Snapshot, Device: d.Name, Size: d.Manifest.Size, Ranges: []kernel.Extent{}}
	tree, err := c.from.LoadTree(ctx, d.Manifest.Layers)
	if ctx.Err() != nil {
		return f, context.Cause(ctx)
	}
	if err != nil {
		f.Ranges = []kernel.Extent{{Length: f.Size}}
		f.because(fmt.Errorf("its layers: %w", err))
		return f, nil
	}
	type numbered struct {
		*shape
		number int64
	}
	var layers []numbered
	complete := false
	for _, n := range tree.Nodes {
		number, ok := parseName(n.Name)
		if !ok || n.Subtree == nil {
			f.Ranges = []kernel.Extent{{Length: f.Size}}
			f.because(damaged("%q is not a layer", n.Name))
			return f, nil
		}
		l := c.layer(ctx, *n.Subtree)
		if ctx.Err() != nil {
			return f, context.Cause(ctx)
		}
		layers = append(layers, numbered{l, number})
		complete = complete || l.err == nil && l.whole >= f.Size
		touched = touched || l.err != nil
		for _, p := range l.parts {
			touched = touched || p.err != nil
			if p.sums != nil {
				f.because(fmt.Errorf("part %s: %w", p.tree.Str(), p.sums))
			}
		}
	}
	if complete && !touched {
		return f, nil
	}
	slices.SortFunc(layers, func(a, b numbered) int { return cmp.Compare(b.number, a.number) })
	s := &sweep{checker: c, finding: &f}
	if f.Size > 0 {
		s.open = []kernel.Extent{{Length: f.Size}}
	}
	for _, l := range layers { // newest first
		if err := s.layer(ctx, l.shape); err != nil {
			return f, err
		}
	}
	for _, e := range s.open {
		s.lose(e, errors.New("no layer has it"))
	}
	f.Ranges = kernel.Align(s.lost, f.Size)
	if f.Ranges == nil {
		f.Ranges = []kernel.Extent{}
	}
	return f, nil
}

// layer looks at a layer once.
func (c *checker) layer(ctx context.Context, id repo.ID) *shape {
	if l := c.layers[id]; l != nil {
		return l
	}
	l := c.lookLayer(ctx, id)
	if ctx.Err() == nil {
		c.layers[id] = l
	}
	return l
}

func (c *checker) lookLayer(ctx context.Context, id repo.ID) *shape {
	l := &shape{}
	tree, err := c.from.LoadTree(ctx, id)
	if err != nil {
		l.err = fmt.Errorf("layer %s: %w", id.Str(), err)
		return l
	}
	for _, n := range tree.Nodes {
		start, ok := parseName(n.Name)
		if !ok || n.Subtree == nil || start%kernel.BlockSize != 0 {
			l.err = fmt.Errorf("layer %s: %w", id.Str(), damaged("%q is not a part", n.Name))
			return l
		}
		p, known := c.parts[*n.Subtree]
		if !known || p.start != start {
			p = look(ctx, c.from, *n.Subtree, start)
			if ctx.Err() != nil {
				return l
			}
			c.parts[*n.Subtree] = p
		}
		l.parts = append(l.parts, p)
	}
	if len(l.parts) == 0 {
		l.err = fmt.Errorf("layer %s: %w", id.Str(), damaged("it has no parts"))
		return l
	}
	slices.SortFunc(l.parts, func(a, b part) int { return cmp.Compare(a.start, b.start) })
	for i, p := range l.parts {
		if i > 0 && p.start < l.parts[i-1].end {
			l.err = fmt.Errorf("layer %s: %w", id.Str(), damaged("the parts at %d and %d overlap", l.parts[i-1].start, p.start))
			return l
		}
		if p.start == l.whole {
			l.whole = p.whole
		}
	}
	return l
}
