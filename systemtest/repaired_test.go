// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// TestARepairedSnapshotIsSeenToBeDamaged: restic's repair leaves a repository
// that it finds clean, in which a device is not whole.
func TestARepairedSnapshotIsSeenToBeDamaged(t *testing.T) {
	t.Parallel()
	r := random(t)
	repaired := 0
	for i := range count(20, 4) {
		m := newMixed(lightEnv(t), r)
		m.back()
		m.back()
		packs := m.env.files("data")
		slices.Sort(packs)
		pack := packs[r.IntN(len(packs))]
		if i == 0 {
			pack = m.largestPack() // data, so that a device is left
		}
		if err := os.Remove(pack); err != nil {
			t.Fatal(err)
		}
		before := m.checked()
		m.restic("0.18", "repair", "index")
		m.restic("0.18", "repair", "snapshots", "--forget")
		if res := finish(t, m.prepare(restics["0.18"], "check", "--read-data")); res.code != 0 {
			t.Fatalf("restic's repair is not complete: %s", res.stderr)
		}
		after := m.checked()
		// Of what cannot be read at all nothing is left.
		left := 0
		for id, original := range m.repaired() {
			_, damaged := before.damaged[original]
			if _, device := m.devices[original]; !device || !damaged {
				continue
			}
			left++
			m.seenWhereItIs(id, original, before, after)
		}
		t.Logf("%d: %d damaged devices are left: %v", i, left, after.messages)
		if len(after.damaged) != left || (after.code == 0) != (left == 0) {
			t.Errorf("%d damaged devices are left after the repair, %d are found: %+v", left, len(after.damaged), after.errors)
		}
		repaired += left
	}
	if repaired == 0 {
		t.Error("no device was repaired")
	}
}

// seenWhereItIs makes sure that a snapshot which restic repaired is named with what cannot be
// given of it: everything, since it is not what it was, and the part in which something is
// seen to be missing. Where the repair emptied device.json, or a folder, nothing else is known.
func (m *mixed) seenWhereItIs(id, original string, before, after checked) {
	m.t.Helper()
	message, ranges := after.messages[id], after.damaged[id]
	list := strings.Fields(m.restic("0.18", "ls", id))
	manifest := slices.IndexFunc(list, func(s string) bool { return strings.HasSuffix(s, "/device.json") })
	switch {
	case manifest < 0:
		if !strings.Contains(message, "folder") {
			m.t.Errorf("snapshot %s has no device.json: %q", id, message)
		}
		return
	case m.restic("0.18", "dump", id, list[manifest]) == "":
		if !strings.Contains(message, "device.json") {
			m.t.Errorf("snapshot %s has an empty device.json: %q", id, message)
		}
		return
	}
	size := int64(len(readAll(m.t, m.devices[original])))
	if want := []kernel.Extent{{Length: size}}; !slices.Equal(ranges, want) || !strings.Contains(message, m.img) {
		m.t.Errorf("snapshot %s, which restic made of the damaged %s, cannot give %v of %s: %q", id, original, ranges, m.img, message)
	}
	if len(before.damaged[original]) > 0 && !strings.Contains(message, "part ") && !strings.Contains(message, "layer ") {
		m.t.Errorf("snapshot %s could not give %v before it was repaired, and where is not said: %q", id, before.damaged[original], message)
	}
}

// repaired are the snapshots that were made of others, and of which.
func (e *env) repaired() map[string]string {
	e.t.Helper()
	var list []struct{ ID, Original string }
	if err := json.Unmarshal([]byte(e.must("--json", "snapshots")), &list); err != nil {
		e.t.Fatal(err)
	}
	out := map[string]string{}
	for _, s := range list {
		if s.Original != "" {
			out[s.ID] = s.Original
		}
	}
	return out
}
