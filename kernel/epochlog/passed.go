// SPDX-License-Identifier: BSD-2-Clause

package epochlog

import (
	"encoding/binary"
	"io"
	"os"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Passed lists the positions after pos that the log holds, at most the newest
// limit, oldest first. It reads the heads of the entries only, so that whoever
// relies on their bitmaps asks [Session.Since]; an entry that is damaged or
// belongs elsewhere is left out. It needs no lock.
func (s *Session) Passed(pos kernel.Position, limit int) []kernel.Position {
	if pos.Tracker != s.uuid {
		return nil
	}
	entries, err := s.log.list()
	if err != nil {
		return nil
	}
	for len(entries) > 0 && entries[0].epoch <= pos.Epoch {
		entries = entries[1:]
	}
	entries = entries[max(0, len(entries)-limit):]
	var out []kernel.Position
	for _, e := range entries {
		if p, ok := s.log.position(e.epoch); ok && p.Tracker == s.uuid && p.Epoch == e.epoch {
			out = append(out, p)
		}
	}
	return out
}

// position reads the head of an entry.
func (l log) position(epoch uint64) (p kernel.Position, ok bool) {
	f, err := os.Open(l.path(epoch))
	if err != nil {
		return p, false
	}
	defer f.Close()
	var b [headerSize]byte
	if _, err := io.ReadFull(f, b[:]); err != nil || string(b[:8]) != magic || binary.LittleEndian.Uint32(b[8:]) != version {
		return p, false
	}
	copy(p.Tracker[:], b[16:])
	p.Epoch = binary.LittleEndian.Uint64(b[32:])
	copy(p.Nonce[:], b[40:])
	return p, true
}
