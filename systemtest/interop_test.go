// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot"
)

// saved is a snapshot of files that restic made, and of what.
type saved struct{ version, id, dir string }

// sourceFiles makes a folder of real files.
func sourceFiles(t testing.TB, from string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "files")
	run(t, "cp", "-r", filepath.Join(goRoot(), "src", from), dir)
	return dir
}

// resticSummary is the last line of `restic backup --json`.
type resticSummary struct {
	MessageType string `json:"message_type"`
	SnapshotID  string `json:"snapshot_id"`
	DataAdded   int64  `json:"data_added"`
	Processed   int64  `json:"total_bytes_processed"`
}

func (e *env) resticBackup(version, path string) (s resticSummary) {
	e.t.Helper()
	lines := strings.Split(strings.TrimSpace(e.restic(version, "backup", "--json", path)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &s); err != nil || s.MessageType != "summary" {
		e.t.Fatalf("restic %s backup: the last line is no summary: %q: %v", version, lines[len(lines)-1], err)
	}
	return s
}

// TestRepositoriesOfResticTakeDevices makes repositories with each restic and
// with us, has both programs fill them in turn, and each list, check, and
// restore what the other one made.
func TestRepositoriesOfResticTakeDevices(t *testing.T) {
	random := random(t)
	c := newContent(random, true)
	for _, maker := range []string{"0.14", "0.18", "ours"} {
		t.Run(maker, func(t *testing.T) {
			e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
			switch maker {
			case "ours":
				e.must("init")
			case "0.14":
				e.restic(maker, "init", "--repository-version", "2")
			default:
				e.restic(maker, "init")
			}
			d := newDisk(t, 64<<20)
			d.track(e)
			raw := direct(t, d.path)
			var files []saved
			var devices []kept
			for i, version := range []string{"0.14", "0.18"} {
				dir := sourceFiles(t, []string{"archive", "compress"}[i])
				files = append(files, saved{version, e.resticBackup(version, dir).SnapshotID, dir})
				fillRange(t, raw, c, int64(i)*8<<20, 12<<20)
				truth := filepath.Join(t.TempDir(), "truth")
				d.image(truth)
				sum := e.backup("--snapshot", "none", d.path)
				if want := []snapshot.Changes{snapshot.ChangesFull, snapshot.ChangesTracker}[i]; sum.Changes != want {
					t.Fatalf("backup %d: changes %s, want %s: %s", i, sum.Changes, want, sum.FallbackReason)
				}
				devices = append(devices, kept{id: sum.SnapshotID.String(), truth: truth})
			}
			e.bothList(files, devices)
			e.check()
			for _, k := range devices {
				e.restoresTo(k.id, k.truth)
			}
			for _, f := range files {
				e.filesRestore(f)
			}
			for version := range restics {
				e.resticReads(version, devices[1].id, d)
			}
			if err := raw.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// bothList has all programs list the snapshots of all programs, and no others.
func (e *env) bothList(files []saved, devices []kept) {
	e.t.Helper()
	var want []string
	for _, f := range files {
		want = append(want, f.id[:8])
	}
	for _, d := range devices {
		want = append(want, d.id[:8])
	}
	slices.Sort(want)
	outputs := map[string]string{"dsync-backup": e.must("snapshots", "--json")}
	for version := range restics {
		outputs["restic "+version] = e.restic(version, "snapshots", "--json")
	}
	for program, out := range outputs {
		var list []listed
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			e.t.Fatalf("%s snapshots: %v", program, err)
		}
		var got []string
		for _, s := range list {
			got = append(got, s.ID[:8])
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			e.t.Fatalf("%s lists %v, want %v", program, got, want)
		}
	}
}

// filesRestore has both versions of restic restore what one of them saved, and
// ours say that this is no device.
func (e *env) filesRestore(f saved) {
	e.t.Helper()
	for version := range restics {
		to := e.t.TempDir()
		e.restic(version, "restore", f.id, "--target", to)
		run(e.t, "diff", "-r", f.dir, filepath.Join(to, f.dir))
	}
	r := e.try("restore", f.id, filepath.Join(e.t.TempDir(), "image"))
	if r.code != 1 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "holds no device") {
		e.t.Fatalf("restore of a snapshot of files: exit code %d, %q", r.code, r.stderr)
	}
}

// resticReads has stock restic walk, search, sum up and restore a snapshot of a
// device: its files are whole, and a dump is what a restore writes.
func (e *env) resticReads(version, id string, d *disk) {
	e.t.Helper()
	to := e.t.TempDir()
	e.restic(version, "restore", id, "--target", to)
	folder := filepath.Join(to, d.path)
	manifest, err := os.ReadFile(filepath.Join(folder, "device.json"))
	if err != nil {
		e.t.Fatal(err)
	}
	m, err := snapshot.ParseManifest(manifest)
	if err != nil || m.Size != 64<<20 || m.BlockSize != kernel.BlockSize {
		e.t.Fatalf("device.json as restic %s restores it: %+v, %v", version, m, err)
	}
	if got := e.restic(version, "dump", id, filepath.Join(d.path, "device.json")); got != string(manifest) {
		e.t.Fatalf("restic %s dump: %q, restored %q", version, got, manifest)
	}
	names := e.restic(version, "ls", id)
	for _, name := range []string{"index", "data", "sums"} {
		if !strings.Contains(names, "/"+name+"\n") {
			e.t.Fatalf("restic %s ls shows no file %q:\n%s", version, name, names)
		}
	}
	if out := e.restic(version, "find", "device.json"); !strings.Contains(out, filepath.Join(d.path, "device.json")) {
		e.t.Fatalf("restic %s find: %q", version, out)
	}
	e.restic(version, "stats", "--mode", "raw-data", id)
	e.restic(version, "stats", "--mode", "restore-size", id)
}

// TestRepositoryOfVersion1SaysHowToUpgradeAndThenWorks: it can be read, and is
// written to after restic upgraded it.
func TestRepositoryOfVersion1SaysHowToUpgradeAndThenWorks(t *testing.T) {
	c := newContent(random(t), true)
	e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
	e.restic("0.14", "init", "--repository-version", "1")
	dir := sourceFiles(t, "archive")
	id := e.resticBackup("0.14", dir).SnapshotID
	d := newDisk(t, 32<<20)
	raw := direct(t, d.path)
	fillRange(t, raw, c, 0, 8<<20)
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	before := e.restic("0.14", "list", "packs")
	r := e.try("backup", d.path)
	if r.code != 1 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "restic migrate upgrade_repo_v2") {
		t.Fatalf("backup: exit code %d, %q", r.code, r.stderr)
	}
	if after := e.restic("0.14", "list", "packs"); after != before {
		t.Fatalf("the refused backup changed the packs from\n%sto\n%s", before, after)
	}
	if list := e.snapshots(); len(list) != 1 || !strings.HasPrefix(list[0].ID, id) {
		t.Fatalf("snapshots: %+v, want %s", list, id)
	}
	e.check()

	e.restic("0.14", "migrate", "upgrade_repo_v2")
	sum := e.backup(d.path)
	e.restoresTo(sum.SnapshotID.String(), d.file)
	e.filesRestore(saved{"0.14", id, dir})
	e.check()
}

// TestImagesOfResticAndDevicesOfOursShareTheirData: whoever comes second finds
// most of a device's long runs in the repository. Cut anywhere else than where
// restic cuts, none of them would be found.
func TestImagesOfResticAndDevicesOfOursShareTheirData(t *testing.T) {
	c := newContent(random(t), false)
	d := newDisk(t, 256<<20)
	d.mkfs("ext4")
	const used = 96 << 20
	for _, name := range []string{"a", "b", "c"} {
		fillFile(t, filepath.Join(d.mnt, name), c, used/3)
	}
	d.umount()
	const most = used / 3
	for version := range restics {
		t.Run("restic "+version+" first", func(t *testing.T) {
			e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
			e.restic(version, "init", "--repository-version", "2")
			first := e.resticBackup(version, d.file)
			sum := e.backup(d.path)
			t.Logf("an image of %d bytes in use: restic added %d, then we added %d (stored %d)", used, first.DataAdded, sum.DataAdded, sum.DataAddedPacked)
			if first.DataAdded < used || sum.DataAdded > most {
				t.Fatalf("restic added %d bytes, we added %d, want at most %d", first.DataAdded, sum.DataAdded, most)
			}
			e.restoresTo(sum.SnapshotID.String(), d.file)
			e.check()
		})
		t.Run("ours first, restic "+version, func(t *testing.T) {
			e := newEnv(t, filepath.Join(t.TempDir(), "repo"))
			e.initLight()
			sum := e.backup(d.path)
			second := e.resticBackup(version, d.file)
			t.Logf("a device of %d bytes in use: we added %d, then restic added %d", used, sum.DataAdded, second.DataAdded)
			if sum.DataAdded < used || second.DataAdded > most {
				t.Fatalf("we added %d bytes, restic added %d, want at most %d", sum.DataAdded, second.DataAdded, most)
			}
			e.restoresTo(sum.SnapshotID.String(), d.file)
			e.filesRestore(saved{version, second.SnapshotID, d.file})
			e.check()
		})
	}
}
