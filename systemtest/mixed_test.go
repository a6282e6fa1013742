// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// mixed is a repository in which device snapshots and restic's file snapshots
// live together, and what each of them must give.
type mixed struct {
	*env
	r       *rand.Rand
	c       *content
	img     string
	files   string
	devices map[string]string // the truth of each, by ID
	folders map[string]string
	rounds  int
}

func newMixed(e *env, r *rand.Rand) *mixed {
	e.t.Helper()
	m := &mixed{env: e, r: r, c: newContent(r, true), devices: map[string]string{}, folders: map[string]string{}}
	m.img = image(e.t, m.c, 12<<20)
	m.files = sourceFiles(e.t, "archive")
	return m
}

// back makes a snapshot of the changed image and one of the changed files.
func (m *mixed) back() {
	m.t.Helper()
	m.rounds++
	f := direct(m.t, m.img)
	writeBlocks(m.t, f, m.c, someBlocks(m.r, 12<<20, 60+m.r.IntN(200)))
	if m.r.IntN(2) == 0 {
		fillRange(m.t, f, m.c, m.r.Int64N(9)<<20, 3<<20)
	}
	if err := f.Close(); err != nil {
		m.t.Fatal(err)
	}
	truth := filepath.Join(m.t.TempDir(), "truth")
	run(m.t, "cp", m.img, truth)
	m.devices[m.backup("--pack-size", "4", m.img).SnapshotID.String()] = truth

	b := make([]byte, 200<<10)
	m.c.fill(b)
	if err := os.WriteFile(filepath.Join(m.files, "new"+strconv.Itoa(m.r.IntN(3))), b, 0o644); err != nil {
		m.t.Fatal(err)
	}
	saved := filepath.Join(m.t.TempDir(), "saved")
	run(m.t, "cp", "-a", m.files, saved)
	id := m.resticBackup([]string{"0.14", "0.18"}[m.r.IntN(2)], m.files).SnapshotID
	for _, full := range m.snapshotIDs() {
		if strings.HasPrefix(full, id) { // restic 0.14 tells the first digits
			m.folders[full] = saved
		}
	}
}

// forgets removes some snapshots, with ours or with restic.
func (m *mixed) forgets() {
	m.t.Helper()
	var args []string
	for _, all := range []map[string]string{m.devices, m.folders} {
		ids := slices.Sorted(maps.Keys(all))
		m.r.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
		for _, id := range ids[:max(0, len(ids)-2)] {
			args = append(args, id)
			delete(all, id)
		}
	}
	if len(args) == 0 {
		return
	}
	if m.r.IntN(2) == 0 {
		m.must(append([]string{"forget"}, args...)...)
	} else {
		m.restic("0.18", append([]string{"forget"}, args...)...)
	}
}

// gives restores what is kept: everything, or one of each kind.
func (m *mixed) gives(all bool) {
	m.t.Helper()
	for id, truth := range m.devices {
		m.restoresTo(id, truth)
		if !all {
			break
		}
	}
	for id, saved := range m.folders {
		to := m.t.TempDir()
		m.restic("0.18", "restore", id, "--target", to)
		run(m.t, "diff", "-r", saved, filepath.Join(to, m.files))
		if !all {
			break
		}
	}
}

// clean has both programs read everything.
func (m *mixed) clean() {
	m.t.Helper()
	m.must("-q", "check", "--read-data")
	m.restic("0.18", "check", "--read-data")
}
