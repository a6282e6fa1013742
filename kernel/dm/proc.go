// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// record is /proc/dsync/<name>/status: one history as the module sees it.
type record struct {
	dir    string // that it was read from
	dev    uint64 // the mapped device, as stat returns it in st_rdev
	name   string // of the mapped device, now
	uuid   kernel.UUID
	below  uint64 // the device beneath
	offset uint64 // on the device beneath, in sectors
	epoch  uint64

	pending       bool
	pendingEpoch  uint64
	pendingNonce  kernel.Nonce
	pendingBlocks int64

	sectors             uint64 // of the target
	blocks              int64
	dirty, pendingDirty int64
	invalid             string // the reason, "" while valid
	live                bool
}

func (r record) size() int64 { return int64(r.sectors) * sectorSize }

// sameEpochs reports that nothing ended and nothing began anew between two
// looks: what was read from the bitmaps between them belongs together.
func (r record) sameEpochs(o record) bool {
	return r.uuid == o.uuid && r.epoch == o.epoch && r.blocks == o.blocks &&
		r.pending == o.pending && r.pendingEpoch == o.pendingEpoch && r.pendingNonce == o.pendingNonce
}

// errNoHistory says that a directory is gone: its last target was removed.
var errNoHistory = errors.New("no history")

func readRecord(dir string) (record, error) {
	b, err := os.ReadFile(filepath.Join(dir, "status"))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ESTALE) {
		return record{}, errNoHistory
	}
	if err != nil {
		return record{}, fmt.Errorf("read the module's status: %w", err)
	}
	r, err := parseRecord(string(b))
	if err != nil {
		return record{}, fmt.Errorf("read the module's status %s: %w", dir, err)
	}
	r.dir = dir
	return r, nil
}

// parseRecord reads lines of "key value". Keys that it does not know are of a
// later minor version; each one that it knows must be there.
func parseRecord(text string) (r record, err error) {
	fields := make(map[string]string)
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		fields[key] = value
	}
	var errs []error
	number := func(key string) uint64 {
		n, err := strconv.ParseUint(fields[key], 10, 64)
		if err != nil {
			errs = append(errs, fmt.Errorf("line %q: %w", key, err))
		}
		return n
	}
	device := func(key, value string) uint64 {
		n, err := parseDev(value)
		if err != nil {
			errs = append(errs, fmt.Errorf("line %q: %w", key, err))
		}
		return n
	}
	below, offset, _ := strings.Cut(fields["below"], " ")
	fields["below offset"] = offset
	r = record{
		dev: device("device", fields["device"]), name: fields["name"],
		below: device("below", below), offset: number("below offset"),
		epoch: number("epoch"), sectors: number("sectors"), live: number("live") == 1,
		blocks: int64(number("blocks")), dirty: int64(number("dirty")),
		pendingBlocks: int64(number("pending_blocks")), pendingDirty: int64(number("pending_dirty")),
	}
	errs = append(errs, r.uuid.UnmarshalText([]byte(fields["uuid"])))
	if size := number("block_size"); size != kernel.BlockSize {
		errs = append(errs, fmt.Errorf("blocks of %d bytes instead of %d", size, kernel.BlockSize))
	}
	if epoch, nonce, ok := strings.Cut(fields["pending"], " "); ok {
		r.pending = true
		fields["pending epoch"] = epoch
		r.pendingEpoch = number("pending epoch")
		errs = append(errs, r.pendingNonce.UnmarshalText([]byte(nonce)))
	} else if fields["pending"] != "-" {
		errs = append(errs, fmt.Errorf("line %q: %q", "pending", fields["pending"]))
	}
	state, reason, _ := strings.Cut(fields["state"], " ")
	switch {
	case state == "invalid" && reason == "":
		r.invalid = "the module gives no reason"
	case state == "invalid":
		r.invalid = reason
	case state != "valid":
		errs = append(errs, fmt.Errorf("line %q: %q", "state", fields["state"]))
	}
	return r, errors.Join(errs...)
}

func parseDev(s string) (uint64, error) {
	major, minor, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("parse device number %q: want major:minor", s)
	}
	return unix.Mkdev(uint32(a), uint32(b)), nil
}

func devString(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// records reads the status of every history. None is no error, and neither is
// a module that is not loaded; one of another version is.
func records() ([]record, error) {
	if err := loadedVersion(); errors.Is(err, ErrNoModule) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(procRoot)
	if err != nil {
		return nil, fmt.Errorf("list dm trackers: %w", err)
	}
	var out []record
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		r, err := readRecord(filepath.Join(procRoot, e.Name()))
		if errors.Is(err, errNoHistory) {
			continue // gone since it was listed
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// find reads the status of the history of a mapped device, in the directory
// where it was last or in another: a renamed device's is renamed later.
func find(dev uint64, dir string) (record, error) {
	if dir != "" {
		r, err := readRecord(dir)
		if err == nil && r.dev == dev {
			return r, nil
		}
		if err != nil && !errors.Is(err, errNoHistory) {
			return record{}, err
		}
	}
	all, err := records()
	if err != nil {
		return record{}, err
	}
	for _, r := range all {
		if r.dev == dev {
			return r, nil
		}
	}
	return record{}, errNoHistory
}
