// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"errors"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/stream"
)

func at(epoch uint64, nonce byte) kernel.Position {
	return kernel.Position{Tracker: kernel.UUID{9}, Epoch: epoch, Nonce: kernel.Nonce{nonce}}
}

// TestWhichStreamsFollow: a stream is applied only if everything by which the
// target may differ from the source is in it.
func TestWhichStreamsFollow(t *testing.T) {
	target := func(position, partly kernel.Position) *mergeState {
		return &mergeState{Written: true, Source: "h:/d", At: position, Partly: partly, Incomplete: !partly.IsZero(), Stream: stream.ID{7}}
	}
	since := func(from, to kernel.Position, through ...kernel.Position) stream.Header {
		return stream.Header{Kind: stream.Since, Size: 1, ID: stream.ID{1}, From: from, To: to, Through: through, Source: "h:/d"}
	}
	var none kernel.Position
	other := at(5, 5)
	other.Tracker[0]++
	sums := stream.ID{3}
	for name, c := range map[string]struct {
		state *mergeState
		h     stream.Header
		ok    bool
		want  string
	}{
		"GoesOn":              {target(at(5, 5), none), since(at(5, 5), at(6, 6)), true, ""},
		"BeganEarlier":        {target(at(5, 5), none), since(at(3, 3), at(6, 6), at(4, 4), at(5, 5)), true, ""},
		"AlreadyThere":        {target(at(6, 6), none), since(at(5, 5), at(6, 6)), true, ""},
		"Gap":                 {target(at(4, 4), none), since(at(5, 5), at(6, 6)), false, "send what changed since"},
		"Older":               {target(at(8, 8), none), since(at(5, 5), at(6, 6)), false, "does not follow"},
		"NeverWas":            {target(at(5, 99), none), since(at(5, 5), at(6, 6)), false, "does not follow"},
		"NeverWasInBetween":   {target(at(5, 99), none), since(at(3, 3), at(6, 6), at(4, 4), at(5, 5)), false, "does not follow"},
		"OtherDevice":         {target(other, none), since(at(5, 5), at(6, 6)), false, "another device's"},
		"NoPosition":          {target(none, none), since(at(5, 5), at(6, 6)), false, "at no position"},
		"NotKnown":            {nil, since(at(5, 5), at(6, 6)), false, "full first"},
		"Mends":               {target(at(5, 5), at(6, 6)), since(at(5, 5), at(7, 7), at(6, 6)), true, ""},
		"MendsWithTheSame":    {target(at(5, 5), at(6, 6)), since(at(5, 5), at(6, 6)), true, ""},
		"DoesNotReach":        {target(at(5, 5), at(7, 7)), since(at(5, 5), at(6, 6)), false, "does not follow"},
		"PartsOfWhatNeverWas": {target(at(5, 5), at(6, 99)), since(at(5, 5), at(7, 7), at(6, 6)), false, "does not follow"},
		"BeganInTheParts":     {target(at(5, 5), at(6, 6)), since(at(6, 6), at(7, 7)), false, "does not follow"},
		"Full":                {target(at(5, 99), at(6, 6)), stream.Header{Kind: stream.Full, ID: stream.ID{1}, Source: "h:/d"}, true, ""},
		"FullOfAnother":       {target(at(5, 5), none), stream.Header{Kind: stream.Full, ID: stream.ID{1}, Source: "h:/e"}, false, "--force"},
		"OtherSums":           {target(at(5, 5), none), stream.Header{Kind: stream.Against, ID: stream.ID{1}, Base: sums, Source: "h:/d"}, false, "other sums"},
		"SameStreamAgain":     {target(none, none), stream.Header{Kind: stream.Against, ID: stream.ID{7}, Base: sums, Source: "h:/d"}, true, ""},
		"Sums":                {target(at(5, 5), none), stream.Header{Kind: stream.Sums, ID: stream.ID{1}, Source: "h:/d"}, false, "no data"},
	} {
		m := &Merge{state: c.state}
		err := m.follows(c.h)
		if (err == nil) != c.ok || err != nil && (!strings.Contains(err.Error(), c.want) || !errors.Is(err, ErrNotFollowing) && !errors.Is(err, ErrHasData)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	given := target(at(5, 5), none)
	given.Sums = sums
	m := &Merge{state: given}
	if err := m.follows(stream.Header{Kind: stream.Against, ID: stream.ID{1}, Base: sums, Source: "h:/d"}); err != nil {
		t.Error(err)
	}
}

func TestPositionGoesThroughText(t *testing.T) {
	for _, p := range []Position{{At: at(5, 5)}, {at(5, 5), at(6, 6), true}} {
		got, err := ParsePosition(p.String())
		if err != nil || got != p {
			t.Errorf("%v became %v: %v", p, got, err)
		}
	}
	for _, s := range []string{"", "none", "x/1/y", at(5, 5).String() + ",", at(5, 5).String() + "/1", strings.Repeat("0", 32) + "/-1/" + strings.Repeat("0", 32)} {
		if p, err := ParsePosition(s); err == nil {
			t.Errorf("%q became %v", s, p)
		}
	}
}
