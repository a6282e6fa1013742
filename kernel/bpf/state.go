// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// stateVersion changes with any change of dsync.bpf.c or of the record below
// that makes one version unable to read or trust what another left running.
const stateVersion uint32 = 2

// step says how far the life of a tracker, or a rotation, has come. It is
// written before what it announces.
type step uint32

const (
	stepStarting step = 1 + iota // not all is attached: not a tracker yet
	stepIdle                     // one epoch runs, the other bitmap is clean
	stepRotating                 // the bitmaps are about to be swapped, or have been
	stepPending                  // an ended epoch waits in the other bitmap
	stepClearing                 // it was acknowledged: the other bitmap is being wiped
	stepStopping                 // being removed: not a tracker any more
)

const (
	mapCount  = 10 // as in mapNames
	linkCount = 14 // as in programNames
	nameSize  = 32
)

// state is the pinned record of a tracker. Magic, version and UUID keep their
// places in every version.
type state struct {
	Magic   [8]byte
	Version uint32
	Step    step
	UUID    kernel.UUID

	Epoch  uint64 // the running one; while rotating, the one that ends
	Active uint32 // index of the running epoch's bitmap; while rotating, of the one that ends

	// PendingAll: the ended epoch counts as wholly dirty, because writes from
	// before the start may still have been in flight.
	PendingAll   uint32
	PendingEpoch uint64
	Nonce        kernel.Nonce // of the rotation under way or pending

	Dev, DiskDev            devnoRecord
	DiskSeq, Start, Sectors uint64
	LoopOffset              uint64
	Mapped                  bool
	Name, Disk              [nameSize]byte
	Started                 int64 // Unix time, ns

	Maps  [mapCount]uint32  // kernel IDs
	Links [linkCount]uint32 // kernel IDs
	Progs [linkCount]uint32 // kernel IDs
}

type devnoRecord struct{ Major, Minor uint32 }

var stateMagic = [8]byte{'d', 's', 'y', 'n', 'c', 'b', 'p', 'f'}

// errNoState says that a record holds nothing, or nothing of ours.
var errNoState = errors.New("no tracker state")

func newState(t target) state {
	s := state{
		Magic: stateMagic, Version: stateVersion, Step: stepStarting,
		UUID: kernel.NewUUID(), Epoch: 1, Started: time.Now().UnixNano(),
		Dev: devnoRecord(t.dev.record()), DiskDev: devnoRecord(t.diskDev.record()),
		DiskSeq: t.diskSeq, Start: t.start, Sectors: t.sectors, LoopOffset: t.loopOffset, Mapped: t.mapped,
	}
	copy(s.Name[:], t.name)
	copy(s.Disk[:], t.disk)
	return s
}

func (d devno) record() devnoRecord { return devnoRecord{d.major, d.minor} }
func (r devnoRecord) devno() devno  { return devno{r.Major, r.Minor} }

func (s *state) target() target {
	return target{
		name: cString(s.Name[:]), dev: s.Dev.devno(),
		disk: cString(s.Disk[:]), diskDev: s.DiskDev.devno(),
		diskSeq: s.DiskSeq, start: s.Start, sectors: s.Sectors, loopOffset: s.LoopOffset, mapped: s.Mapped,
	}
}

func (s *state) encode() ([]byte, error) {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, s); err != nil {
		return nil, fmt.Errorf("encode tracker state: %w", err)
	}
	return b.Bytes(), nil
}

// decodeState reads a record. Of another version it reads magic, version, step
// and UUID only, and it leaves the judgement to the caller. With an error it
// returns what it read.
func decodeState(b []byte) (s state, err error) {
	if err := binary.Read(bytes.NewReader(b), binary.LittleEndian, &s); err != nil {
		return state{}, fmt.Errorf("decode tracker state: %w", err)
	}
	if s.Magic != stateMagic {
		return state{}, errNoState
	}
	if s.Version != stateVersion {
		return state{Magic: s.Magic, Version: s.Version, Step: s.Step, UUID: s.UUID}, nil
	}
	if s.Step < stepStarting || s.Step > stepStopping || s.Active > 1 {
		return s, fmt.Errorf("decode tracker state: step %d, bitmap %d: damaged", s.Step, s.Active)
	}
	return s, nil
}

func loadState(m *ebpf.Map) (state, error) {
	b, err := loadRecord(m)
	if err != nil {
		return state{}, err
	}
	return decodeState(b)
}

func storeState(m *ebpf.Map, s state) error {
	b, err := s.encode()
	if err != nil {
		return err
	}
	return storeRecord(m, b)
}

// loadRecord and storeRecord move the one value of a map. Each is one system
// call, which a signal does not cut in half.
func loadRecord(m *ebpf.Map) ([]byte, error) {
	b, err := m.LookupBytes(uint32(0))
	if err == nil && b == nil {
		err = ebpf.ErrKeyNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("read pinned record: %w", err)
	}
	return b, nil
}

func storeRecord(m *ebpf.Map, b []byte) error {
	value := make([]byte, m.ValueSize())
	if copy(value, b) < len(b) {
		return fmt.Errorf("write pinned record: %d bytes do not fit into %d", len(b), len(value))
	}
	if err := m.Put(uint32(0), value); err != nil {
		return fmt.Errorf("write pinned record: %w", err)
	}
	return nil
}

func cString(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}
