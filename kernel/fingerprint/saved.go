// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
)

// ErrNotSaved says that no saved state can be used. The text that wraps it
// gives the reason in one line.
var ErrNotSaved = errors.New("the tracker's history cannot go on")

const (
	fileName   = "saved"
	tempPrefix = ".new-" // which the epoch log sweeps
	fileMagic  = "DSYNCSAV1 "
	maxFile    = 1 << 20
)

// Identity is what the caller knows of a device that stays the same over a
// reboot: a serial number, a WWID, a UUID of its table, by name. Values that
// are missing or empty on one side say nothing.
type Identity map[string]string

// contradicts names a field that both have, with different values.
func (id Identity) contradicts(other Identity) (field string, yes bool) {
	for k, v := range id {
		if w := other[k]; v != "" && w != "" && v != w {
			return k, true
		}
	}
	return "", false
}

// agrees reports that some field has the same value in both.
func (id Identity) agrees(other Identity) bool {
	for k, v := range id {
		if v != "" && other[k] == v {
			return true
		}
	}
	return false
}

// Saved is a tracker's history put away at a clean stop.
type Saved struct {
	Tracker     string          `json:"tracker"` // its kind: "bpf", "dm"
	Last        kernel.Position `json:"last"`    // the newest position in the epoch log; the next epoch follows it
	Fingerprint Fingerprint     `json:"fingerprint"`
	Identity    Identity        `json:"identity"`
	Device      string          `json:"device"`  // its path then, for messages
	BootID      string          `json:"boot_id"` // of the machine's run that saved it
	Time        time.Time       `json:"time"`
	Nonce       kernel.Nonce    `json:"nonce"` // drawn by Save
	Birth       birth           `json:"birth"` // of the file itself; by Save
}

// birth is what a file system says of a file and no copy of the file can have.
type birth struct {
	Inode uint64 `json:"inode"`
	Sec   int64  `json:"sec"`
	Nsec  uint32 `json:"nsec"`
}

func birthOf(f *os.File) (birth, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BTIME|unix.STATX_INO, &st); err != nil {
		return birth{}, fmt.Errorf("look at %s: %w", f.Name(), err)
	}
	if st.Mask&unix.STATX_BTIME == 0 || st.Mask&unix.STATX_INO == 0 {
		return birth{}, fmt.Errorf("look at %s: its file system keeps no time of birth, without which a copy cannot be told from it; use another --state-dir", f.Name())
	}
	return birth{st.Ino, st.Btime.Sec, st.Btime.Nsec}, nil
}

// Encode writes the file's content: a line with a checksum, then JSON.
func (s Saved) Encode() []byte {
	body, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		panic(err) // no field can fail
	}
	body = append(body, '\n')
	sum := sha256.Sum256(body)
	return append([]byte(fileMagic+hex.EncodeToString(sum[:])+"\n"), body...)
}

// Decode reads what Encode wrote.
func Decode(data []byte) (s Saved, err error) {
	line, body, _ := bytes.Cut(data, []byte("\n"))
	sum := sha256.Sum256(body)
	if string(line) != fileMagic+hex.EncodeToString(sum[:]) {
		return s, errors.New("it is damaged, or of another version")
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Saved{}, fmt.Errorf("it is damaged: %w", err)
	}
	if s.Last.IsZero() || s.Last.Epoch == 0 {
		return Saved{}, errors.New("it has no position")
	}
	return s, nil
}

// folder is that of a tracker's epoch log.
func folder(stateDir string, u kernel.UUID) string {
	return filepath.Join(stateDir, "trackers", u.String())
}

// Save makes a state durable in the state directory, in place of an older one of
// the tracker. The caller holds the tracker's lock and the device, has logged
// the epoch that s.Last ends, and has taken the tracker off the device: what
// Save has returned for is trusted, whatever is written later. A fingerprint
// that proves nothing is not saved, with an [ErrNoProof].
func Save(stateDir string, s Saved) error {
	if err := s.Fingerprint.Proof(); err != nil {
		return fmt.Errorf("save tracking: %w", err)
	}
	dir := folder(stateDir, s.Last.Tracker)
	if err := atEnd(dir, s.Last); err != nil {
		return fmt.Errorf("save tracking: %w", err)
	}
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return fmt.Errorf("save tracking: %w", err)
	}
	s.Nonce = kernel.NewNonce()
	if s.Birth, err = birthOf(f); err == nil {
		_, err = f.Write(s.Encode())
	}
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, fileName))
	}
	if err != nil {
		return fmt.Errorf("save tracking: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return syncDir(dir)
}

// read loads the saved state in a tracker's folder, os.ErrNotExist if there is
// none, and makes sure that it is the file that Save wrote, at the end of the log
// that it was saved with.
func read(dir, name string) (s Saved, err error) {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return s, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return s, err
	}
	if s, err = Decode(data); err != nil {
		return s, fmt.Errorf("%s: %w", f.Name(), err)
	}
	b, err := birthOf(f)
	if err != nil {
		return s, err
	}
	if b != s.Birth {
		return s, fmt.Errorf("%s is a copy: the state directory was restored", f.Name())
	}
	if s.Last.Tracker.String() != filepath.Base(dir) {
		return s, fmt.Errorf("%s belongs to the tracker %s", f.Name(), s.Last.Tracker)
	}
	return s, atEnd(dir, s.Last)
}

// atEnd makes sure that last is the newest position of the log in dir.
func atEnd(dir string, last kernel.Position) error {
	name := fmt.Sprintf("%016x", last.Epoch)
	data, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("epoch %d is not in the log %s", last.Epoch, dir)
	}
	if err != nil {
		return err
	}
	e, err := epochlog.Decode(data)
	if err != nil {
		return fmt.Errorf("epoch log entry %s: %w", filepath.Join(dir, name), err)
	}
	if e.Position != last {
		return fmt.Errorf("the epoch log %s holds %s instead of %s", dir, e.Position, last)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if n, err := strconv.ParseUint(e.Name(), 16, 64); err == nil && len(e.Name()) == 16 && n > last.Epoch {
			return fmt.Errorf("the epoch log %s goes on after epoch %d", dir, last.Epoch)
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
