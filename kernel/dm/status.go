// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// renewed is what happens next, whatever the reason.
const renewed = "; the next backup begins a new history"

// Status looks at the history, the mapped device and its table; see
// [kernel.Tracker].
func (t *Tracker) Status(ctx context.Context) (kernel.Status, error) {
	st := kernel.Status{Device: t.Device(), Below: t.Below(), Tracker: "dm", UUID: t.uuid, BlockSize: kernel.BlockSize}
	r, err := t.look(ctx)
	if errors.Is(err, kernel.ErrNotTracked) {
		st.Reason = "tracking was stopped, or begun anew"
		return st, nil
	}
	if err != nil {
		return kernel.Status{}, err
	}
	st.Device, st.Epoch = t.Device(), r.epoch
	st.Reason, err = t.inspect(ctx, r)
	st.Reliable = st.Reason == ""
	return st, err
}

// Dirty counts marked blocks; see [kernel.Tracker].
func (t *Tracker) Dirty(ctx context.Context) (int64, error) {
	r, err := t.look(ctx)
	if errors.Is(err, kernel.ErrNotTracked) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if r.dirty == 0 || r.pendingDirty == 0 {
		return r.dirty + r.pendingDirty, nil
	}
	active, frozen := kernel.NewBitmap(r.blocks), kernel.NewBitmap(r.pendingBlocks)
	err = errors.Join(addBits(r.dir, fileActive, active), addBits(r.dir, fileFrozen, frozen))
	if after, lookErr := t.look(ctx); lookErr != nil || !r.sameEpochs(after) {
		return max(r.dirty, r.pendingDirty), lookErr // an epoch ended meanwhile
	}
	if err != nil {
		return 0, err
	}
	n := active.Count()
	for i := frozen.NextSet(0); i < frozen.Blocks(); i = frozen.NextSet(i + 1) {
		if i >= active.Blocks() || !active.Get(i) {
			n++
		}
	}
	return n, nil
}

// inspect says why the tracker is not reliable, or nothing. A device that is
// only suspended is none of the reasons: nothing is written to it meanwhile.
func (t *Tracker) inspect(ctx context.Context, r record) (string, error) {
	if r.invalid != "" {
		return r.invalid + renewed, nil
	}
	if !r.live {
		return "its table is not live yet: resume the device", nil
	}
	reason, err := t.inspectTable(r)
	if reason == "" || err != nil {
		return reason, err
	}
	// So that it stays so when the table is put right again.
	if err := t.Invalidate(ctx, reason); err != nil && !errors.Is(err, kernel.ErrNotTracked) {
		return reason + renewed, nil //nolint:nilerr // a table without our target cannot be told; the module knows
	}
	return reason + renewed, nil
}

// inspectTable looks whether the live table has the whole device pass through
// the target.
func (t *Tracker) inspectTable(r record) (string, error) {
	const gone = "the mapped device is gone"
	before, err := devmapper.Stat(r.name)
	if errors.Is(err, unix.ENXIO) {
		return gone, nil
	}
	if err != nil {
		return "", err
	}
	if before.Dev != t.dev {
		return gone, nil
	}
	table, err := devmapper.Table(r.name, devmapper.Query{})
	if err != nil {
		return "", err
	}
	// The module lets no other target stand behind its own.
	if len(table) != 1 || table[0].Type != targetType {
		return fmt.Sprintf("the table of %s was changed to one that does not track", t.Device()), nil
	}
	d, err := describe(t.dev)
	if err != nil {
		return "", err
	}
	// While a table of another length is put in place, the device is suspended
	// and the three need not agree.
	after, err := devmapper.Stat(r.name)
	if err != nil {
		return "", err
	}
	again, err := find(t.dev, r.dir)
	if err != nil || before.Suspended || after.Suspended || before.Event != after.Event || again.sectors != r.sectors {
		return "", nil //nolint:nilerr // gone since: the next look says so
	}
	if d.sectors != r.sectors || table[0].Length != r.sectors {
		return fmt.Sprintf("%s has %d sectors, of which %d are tracked", t.Device(), d.sectors, r.sectors), nil
	}
	return "", nil
}
