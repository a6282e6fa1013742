// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Position is where a target is: complete up to At, and if it is not, then
// brought in parts to Partly.
type Position struct {
	At, Partly kernel.Position
	Incomplete bool
}

// String is TRACKER/EPOCH/NONCE, for an incomplete target followed by a comma
// and how far parts of it were brought.
func (p Position) String() string {
	s := "none"
	if !p.At.IsZero() {
		s = p.At.String()
	}
	if !p.Partly.IsZero() && !p.At.IsZero() {
		s += "," + p.Partly.String()
	}
	return s
}

// ParsePosition reads what String writes, but for "none".
func ParsePosition(s string) (p Position, err error) {
	at, partly, incomplete := strings.Cut(s, ",")
	if p.At, err = parsePosition(at); err == nil && incomplete {
		p.Incomplete = true
		p.Partly, err = parsePosition(partly)
	}
	return p, err
}

func parsePosition(s string) (p kernel.Position, err error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return p, fmt.Errorf("position %q: want TRACKER/EPOCH/NONCE, as merge prints it", s)
	}
	if err = p.Tracker.UnmarshalText([]byte(parts[0])); err == nil {
		if p.Epoch, err = strconv.ParseUint(parts[1], 10, 64); err == nil {
			err = p.Nonce.UnmarshalText([]byte(parts[2]))
		}
	}
	if err != nil {
		return p, fmt.Errorf("position %q: %w", s, err)
	}
	return p, nil
}
