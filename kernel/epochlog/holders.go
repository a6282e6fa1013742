// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// holderDir is the folder, in that of a tracker's log, with a file for each
// holder.
const holderDir = "holders"

// Holder is a repository with a snapshot that is complete up to a position, and
// so needs every later epoch for the next one.
type Holder struct {
	Repository string          `json:"repository"` // its ID
	Location   string          `json:"location"`   // where it was; no credentials
	Name       string          `json:"name"`       // of the device in its snapshots
	Snapshot   string          `json:"snapshot"`   // the newest, by ID
	Position   kernel.Position `json:"position"`
	Time       time.Time       `json:"time"` // of the backup
}

// file names a holder's file: one for each repository and device name.
func (h Holder) file() string {
	sum := sha256.Sum256([]byte(h.Repository + "\x00" + h.Name))
	return hex.EncodeToString(sum[:16]) + ".json"
}

// Hold records, durably, that a repository has a snapshot at a position, in
// place of what it had before; one with a later position is left alone. It
// needs the lock.
func (s *Session) Hold(h Holder) error {
	if s.lock == nil {
		return fmt.Errorf("hold a position: %w", errUnlocked)
	}
	if h.Position.Tracker != s.uuid {
		return fmt.Errorf("hold a position: it belongs to the tracker %s, not %s", h.Position.Tracker, s.uuid)
	}
	dir := filepath.Join(s.log.dir, holderDir)
	have, err := readHolder(filepath.Join(dir, h.file()))
	if err == nil && have.Position.Epoch > h.Position.Epoch && s.verifies(have.Position) {
		return nil // two backups at once, and this one ended later
	}
	if err := s.log.create(); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err == nil {
		err = syncDir(s.log.dir)
		if err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make epoch log: %w", err)
	}
	data, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("hold a position: %w", err)
	}
	return writeFile(dir, h.file(), data)
}

func (s *Session) verifies(pos kernel.Position) bool {
	_, err := s.verify(pos)
	return err == nil
}

// Holders lists the repositories that hold a position of a tracker, sorted by
// location and name. A file that cannot be read is passed over: what it held
// is found again by the repository's next backup.
func Holders(stateDir string, u kernel.UUID) ([]Holder, error) {
	return logOf(stateDir, u).holders()
}

func (l log) holders() ([]Holder, error) {
	dir := filepath.Join(l.dir, holderDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read epoch log: %w", err)
	}
	var out []Holder
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		if h, err := readHolder(filepath.Join(dir, e.Name())); err == nil {
			out = append(out, h)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := out[i], out[j]
		if a.Location != b.Location {
			return a.Location < b.Location
		}
		return a.Name < b.Name
	})
	return out, nil
}

func readHolder(path string) (h Holder, err error) {
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &h)
	}
	if err != nil {
		return h, fmt.Errorf("read %s: %w", path, err)
	}
	return h, nil
}
