// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// tempPrefix marks files that are not entries yet.
const tempPrefix = ".new-"

// log is the folder of one tracker's entries. Writers hold the tracker's lock;
// readers need not, since an entry appears whole.
type log struct{ dir string }

// logOf names the folder of a tracker's log in a state directory.
func logOf(stateDir string, u kernel.UUID) log {
	return log{filepath.Join(stateDir, "trackers", u.String())}
}

func (l log) path(epoch uint64) string {
	return filepath.Join(l.dir, fmt.Sprintf("%016x", epoch))
}

// entry is a file of the log that is whole, its bitmap not decoded yet.
type entry struct {
	header
	payload []byte
}

// read loads the entry of an epoch; os.ErrNotExist if there is none.
func (l log) read(epoch uint64) (entry, error) {
	data, err := os.ReadFile(l.path(epoch))
	if err != nil {
		return entry{}, fmt.Errorf("read epoch log: %w", err)
	}
	h, payload, err := decodeHeader(data)
	if err == nil && h.position.Epoch != epoch {
		err = fmt.Errorf("it holds epoch %d", h.position.Epoch)
	}
	if err != nil {
		return entry{}, fmt.Errorf("read epoch log entry %s: %w", l.path(epoch), err)
	}
	return entry{h, payload}, nil
}

// write makes an ended epoch durable. An entry that is there with the same
// position is left alone; one with another nonce comes from a future that
// never was, on a machine that was reverted, and is replaced: what the kernel
// says is what happened.
func (l log) write(e kernel.Epoch) error {
	if have, err := l.read(e.Position.Epoch); err == nil && have.position == e.Position {
		return syncDir(l.dir) // its writer may have died before doing so
	}
	if err := l.create(); err != nil {
		return err
	}
	return writeFile(l.dir, filepath.Base(l.path(e.Position.Epoch)), Encode(e))
}

// writeFile makes a file whole and durable, in place of one that was there.
func writeFile(dir, name string, data []byte) error {
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return fmt.Errorf("write epoch log: %w", err)
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		return fmt.Errorf("write epoch log: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return syncDir(dir)
}

// create makes the folder, durably from the state directory down.
func (l log) create() error {
	if _, err := os.Stat(l.dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return fmt.Errorf("make epoch log: %w", err)
	}
	trackers := filepath.Dir(l.dir)
	stateDir := filepath.Dir(trackers)
	return errors.Join(syncDir(trackers), syncDir(stateDir), syncDir(filepath.Dir(stateDir)))
}

// sweep removes what a crash left half written.
func (l log) sweep() error {
	for _, dir := range []string{l.dir, filepath.Join(l.dir, holderDir)} {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read epoch log: %w", err)
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), tempPrefix) {
				continue
			}
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("tidy epoch log: %w", err)
			}
		}
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}
