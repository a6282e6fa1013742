// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
)

// randomPrune makes flags that both programs know.
func randomPrune(r *rand.Rand) []string {
	args := []string{"prune", "--max-unused", []string{"0", "5%", "20%", "300k", "unlimited"}[r.IntN(5)]}
	for _, f := range []string{"--repack-cacheable-only", "--repack-small", "--repack-uncompressed"} {
		if r.IntN(6) == 0 {
			args = append(args, f)
		}
	}
	if r.IntN(5) == 0 {
		args = append(args, "--max-repack-size", "2M")
	}
	return args
}

func TestOurPruneAndResticsTakeTurns(t *testing.T) {
	t.Parallel()
	m := newMixed(lightEnv(t), random(t))
	for i := range count(20, 5) {
		m.back()
		m.back()
		m.forgets()
		args := randomPrune(m.r)
		program := []string{"ours", "0.18", "ours", "0.14"}[i%4]
		t.Logf("%s %q", program, args)
		if program == "ours" {
			m.must(args...)
		} else {
			m.restic(program, args...)
		}
		m.clean()
		if i%4 == 0 {
			m.restic("0.14", "check", "--read-data")
		}
		m.gives(false)
	}
	m.must("prune", "--max-unused", "0")
	m.clean()
	m.gives(true)
}

// pruned is what a repository takes after a prune, by what restic says.
func (m *mixed) pruned(program string, args ...string) (packs int64) {
	m.t.Helper()
	copied := *m
	e := *m.env
	copied.env = &e
	e.repo = filepath.Join(m.t.TempDir(), "repo")
	run(m.t, "cp", "-a", m.repo, e.repo)
	e.vars = append(slices.Clone(m.vars), "RESTIC_REPOSITORY="+e.repo)
	if program == "ours" {
		e.must(args...)
	} else {
		e.restic(program, args...)
	}
	copied.clean()
	for _, p := range e.files("data") {
		fi, err := os.Stat(p)
		if err != nil {
			m.t.Fatal(err)
		}
		packs += fi.Size()
	}
	return packs
}

// TestPruneFreesAboutWhatResticFrees prunes copies of one repository.
func TestPruneFreesAboutWhatResticFrees(t *testing.T) {
	t.Parallel()
	m := newMixed(lightEnv(t), random(t))
	for range 6 {
		m.back()
	}
	m.forgets()
	for _, args := range [][]string{
		{"--max-unused", "0"},
		{"--max-unused", "5%"},
		{"--max-unused", "30%"},
		{"--max-unused", "unlimited"},
		{"--max-unused", "0", "--max-repack-size", "5M"},
		{"--repack-cacheable-only"},
		{"--repack-small", "--max-unused", "unlimited"},
	} {
		args = append([]string{"prune"}, args...)
		ours, restics := m.pruned("ours", args...), m.pruned("0.18", args...)
		t.Logf("%q: ours leaves %d bytes in packs, restic %d", args[1:], ours, restics)
		if ours > restics*105/100+64<<10 || restics > ours*105/100+64<<10 {
			t.Errorf("%q: %d bytes, restic leaves %d", args[1:], ours, restics)
		}
	}
}

func TestPruneAndCheckOnMinIO(t *testing.T) {
	s := miniotest.Start(t)
	s.MakeBucket("backups")
	e := newEnv(t, s.Location("backups", "repo"), s.Environ()...)
	s.Setenv(t)
	e.initLight()
	m := newMixed(e, random(t))
	for range 3 {
		m.back()
	}
	m.forgets()
	e.must("forget", "--keep-last", "1", "--prune", "--max-unused", "0")
	for _, all := range []map[string]string{m.devices, m.folders} {
		for id := range all {
			if !slices.Contains(e.snapshotIDs(), id) {
				delete(all, id)
			}
		}
	}
	m.clean()
	m.gives(true)
	e.must("repair", "index", "--read-all-packs")
	m.clean()
}

// TestLocksOfOthersAreRespected: what removes something waits for everybody.
func TestLocksOfOthersAreRespected(t *testing.T) {
	e := lightEnv(t)
	img := image(t, newContent(random(t), false), 1<<20)
	e.backup(img)
	r := e.opened()
	lock, err := r.Lock(t.Context(), false, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"prune"}, {"forget", "--keep-last", "1"}, {"check"}, {"repair", "index"}} {
		e.fails(11, "locked", args...)
	}
	for _, args := range [][]string{{"prune", "--dry-run"}, {"forget", "--keep-last", "1", "--dry-run"}, {"check"}, {"snapshots"}, {"ls", "latest"}} {
		e.must(append([]string{"--no-lock"}, args...)...)
	}
	for _, args := range [][]string{{"prune"}, {"repair", "index"}, {"backup", img}} {
		e.fails(1, "--no-lock", append([]string{"--no-lock"}, args...)...)
	}
	e.must("unlock")
	if n := len(e.files("locks")); n != 1 {
		t.Errorf("unlock leaves %d locks of a live process", n)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	if n := len(e.files("locks")); n != 0 {
		t.Errorf("%d locks are left", n)
	}
}

// TestAStoreThatCannotBeWrittenToIsRead: with --no-lock everything that reads
// works on a repository that is read-only.
func TestAStoreThatCannotBeWrittenToIsRead(t *testing.T) {
	e := lightEnv(t)
	img := image(t, newContent(random(t), false), 2<<20)
	e.backup(img)
	ro := filepath.Join(t.TempDir(), "ro")
	if err := os.Mkdir(ro, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "--bind", e.repo, ro)
	t.Cleanup(func() { run(t, "umount", ro) })
	run(t, "mount", "-o", "remount,ro,bind", ro)
	e.vars = append(e.vars, "RESTIC_REPOSITORY="+ro)
	e.fails(1, "read-only", "snapshots")
	to := filepath.Join(t.TempDir(), "to")
	for _, args := range [][]string{{"snapshots"}, {"ls", "latest"}, {"restore", "latest", to}, {"verify", "latest", img}, {"check", "--read-data"}} {
		e.must(append([]string{"--no-lock"}, args...)...)
	}
	same(t, img, to)
	if out := e.must("--no-lock", "dump", "latest"); len(out) != 2<<20 {
		t.Errorf("dump gives %d bytes", len(out))
	}
}

// TestPruneSaysWhatItDoes: the numbers of the summary are those of the store.
func TestPruneSaysWhatItDoes(t *testing.T) {
	m := newMixed(lightEnv(t), random(t))
	for range 4 {
		m.back()
	}
	m.forgets()
	var before, after int64
	for _, p := range m.env.files("data") {
		fi, _ := os.Stat(p)
		before += fi.Size()
	}
	out := strings.Split(strings.TrimSpace(m.must("prune", "--json", "--max-unused", "0")), "\n")
	var s struct {
		MessageType string `json:"message_type"`
		Before      int64  `json:"bytes_before"`
		After       int64  `json:"bytes_after"`
		Unused      int64  `json:"bytes_unused_after"`
	}
	if err := json.Unmarshal([]byte(out[len(out)-1]), &s); err != nil || s.MessageType != "summary" {
		t.Fatalf("%v: %q", err, out)
	}
	for _, p := range m.env.files("data") {
		fi, _ := os.Stat(p)
		after += fi.Size()
	}
	if got, want := fmt.Sprint(s.Before, s.After, s.Unused), fmt.Sprint(before, after, 0); got != want {
		t.Errorf("it says %s, it is %s", got, want)
	}
	// The cache does not keep what is gone.
	cached := func() (n int) {
		for _, v := range m.vars {
			if dir, ok := strings.CutPrefix(v, "DSYNC_CACHE_DIR="); ok {
				blobs, _ := filepath.Glob(filepath.Join(dir, "*", "blobs", "*", "*"))
				n = len(blobs)
			}
		}
		return n
	}
	n := cached()
	for id := range m.devices {
		m.must("forget", id)
	}
	m.must("prune", "--max-unused", "0")
	if now := cached(); now >= n {
		t.Errorf("the cache holds %d blobs, %d before everything was pruned", now, n)
	}
}

// TestBackupToAStoreThatDoesNotDelete: credentials that may add and read, and
// delete nothing, not even locks. A backup works and says what it leaves; what
// would delete fails and harms nothing.
func TestBackupToAStoreThatDoesNotDelete(t *testing.T) {
	s := miniotest.Start(t)
	s.MakeBucket("backups")
	owner := newEnv(t, s.Location("backups", "repo"), s.Environ()...)
	s.Setenv(t)
	owner.initLight()
	policy := `{"Version":"2012-10-17","Statement":[
		{"Effect":"Allow","Principal":{"AWS":["*"]},"Action":["s3:ListBucket","s3:GetBucketLocation"],"Resource":["arn:aws:s3:::backups"]},
		{"Effect":"Allow","Principal":{"AWS":["*"]},"Action":["s3:GetObject","s3:PutObject"],"Resource":["arn:aws:s3:::backups/*"]}]}`
	if err := s.Client().SetBucketPolicy(t.Context(), "backups", policy); err != nil {
		t.Fatal(err)
	}
	anonymous := []string{"-q", "-o", "s3.unsafe-anonymous-auth=true"}
	c := newContent(random(t), true)
	img := image(t, c, 4<<20)
	for i := range 3 {
		fillRange(t, direct(t, img), c, int64(i)<<20, 1<<20)
		r := owner.try(append(anonymous, "--json", "backup", img)...)
		if r.code != 0 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "unlock` with credentials that may delete") {
			t.Fatalf("backup %d: exit code %d, %s%s", i, r.code, r.stdout, r.stderr)
		}
		summary(t, r.stdout)
		if n := objects(t, s, "backups", "repo/locks/"); n != i+1 {
			t.Fatalf("%d locks after %d backups", n, i+1)
		}
	}
	to := filepath.Join(t.TempDir(), "to")
	r := owner.try(append(anonymous, "restore", "latest", to)...)
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	same(t, img, to)
	before := objects(t, s, "backups", "repo/")
	if r := owner.try(append(anonymous, "forget", "--keep-last", "1", "--prune")...); r.code != 11 {
		t.Fatalf("forget beside the locks that are left: %+v", r)
	}
	owner.must("unlock")
	if n := objects(t, s, "backups", "repo/locks/"); n != 0 {
		t.Fatalf("unlock leaves %d locks of processes of this host that are gone", n)
	}
	if r := owner.try(append(anonymous, "forget", "--keep-last", "1", "--prune")...); r.code != 1 || !strings.Contains(r.stderr, "2 of 2 snapshots could not be removed") {
		t.Fatalf("forget without the right to delete: %+v", r)
	}
	owner.must("unlock")
	if n := objects(t, s, "backups", "repo/"); n > before {
		t.Errorf("%d objects, %d before", n, before)
	}
	owner.must("forget", "--keep-last", "1", "--prune")
	owner.must("-q", "check", "--read-data")
	owner.restic("0.18", "check", "--read-data")
	owner.restoresTo(owner.snapshotIDs()[0], img)
}
