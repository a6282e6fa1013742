// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
)

// mustBeOneLine holds what users see to one line.
func mustBeOneLine(t testing.TB, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Error("no error")
		return
	}
	if strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "%!") {
		t.Errorf("not one clean line: %q", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%q does not say %q", err, p)
		}
	}
}

func TestWrongPasswordAndNoRepositoryAreToldApart(t *testing.T) {
	_, dir := newRepo(t, Options{})
	_, err := Open(t.Context(), openLocal(t, dir), "wrong", Options{})
	if !errors.Is(err, ErrWrongPassword) || errors.Is(err, ErrNoRepository) {
		t.Error(err)
	}
	mustBeOneLine(t, err, dir, "wrong password")
	empty := t.TempDir()
	for _, where := range []string{empty, filepath.Join(empty, "nowhere")} {
		_, err = Open(t.Context(), openLocal(t, where), testPassword, Options{})
		if !errors.Is(err, ErrNoRepository) || errors.Is(err, ErrWrongPassword) {
			t.Error(err)
		}
		mustBeOneLine(t, err, where, "no repository")
	}
}

func TestASecondInitIsRefused(t *testing.T) {
	_, dir := newRepo(t, Options{})
	for range 2 {
		_, err := Init(t.Context(), openLocal(t, dir), testPassword, Options{KDF: lightKDF})
		if !errors.Is(err, ErrExist) {
			t.Error(err)
		}
		mustBeOneLine(t, err, dir)
		// Without a config, the keys show that there was a repository.
		if err := os.Remove(filepath.Join(dir, "config")); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

func TestOpenFindsTheKeyAmongSeveral(t *testing.T) {
	_, dir := newRepo(t, Options{})
	s := stockRestics(t)[1]
	pw := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(pw, []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.run(t, dir, "key", "add", "--new-password-file", pw)
	// A key file that cannot be read does not hide the others.
	junk := []byte("junk")
	if err := os.WriteFile(filepath.Join(dir, "keys", Hash(junk).String()), junk, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, password := range []string{testPassword, "second"} {
		if _, err := Open(t.Context(), openLocal(t, dir), password, Options{}); err != nil {
			t.Error(err)
		}
	}
	if _, err := Open(t.Context(), openLocal(t, dir), "third", Options{}); !errors.Is(err, ErrWrongPassword) {
		t.Error(err)
	}
}

// damage changes a file of the repository in place.
func damage(t testing.TB, dir string, change func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, change(bytes.Clone(data)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func onlyFile(t testing.TB, pattern string) string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) != 1 {
		t.Fatalf("%s: %v, %v", pattern, names, err)
	}
	return names[0]
}

func TestTruncatedIndexIsNamed(t *testing.T) {
	for _, cut := range []int{0, 10, 100} {
		r, dir := newRepo(t, Options{})
		testBackup(t, r, newRand(t))
		file := onlyFile(t, filepath.Join(dir, "index", "*"))
		damage(t, file, func(b []byte) []byte { return b[:cut] })
		again, err := Open(t.Context(), openLocal(t, dir), testPassword, Options{})
		if err != nil {
			t.Fatal(err)
		}
		err = again.LoadIndex(t.Context())
		if !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
		mustBeOneLine(t, err, "index "+filepath.Base(file)[:8], "`repair index`")
	}
}

func TestFlippedByteInAPackNamesBlobAndPack(t *testing.T) {
	r, dir := newRepo(t, Options{})
	w := r.NewWriter(t.Context(), WriterOptions{})
	s, err := w.SaveBlob(t.Context(), KindData, []byte("some data"))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	file := onlyFile(t, filepath.Join(dir, "data", "*", "*"))
	damage(t, file, func(b []byte) []byte { b[20] ^= 1; return b })
	h := BlobHandle{Type: DataBlob, ID: s.ID}
	_, err = r.LoadBlob(t.Context(), h, KindData)
	if !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	mustBeOneLine(t, err, s.ID.Str(), filepath.Base(file)[:8])

	_, err = r.LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: ID{1}}, KindData)
	if !errors.Is(err, ErrBlobNotFound) {
		t.Error(err)
	}
	mustBeOneLine(t, err, "01000000")
}

// twoCopies makes a repository in which each of n blobs lies in two packs, and
// returns the blobs and the packs.
func twoCopies(t testing.TB, n int, size func(int) int) (r *Repository, dir string, blobs [][]byte, packs []ID) {
	t.Helper()
	r, dir = newRepo(t, Options{Compression: CompressionOff})
	rng := newRand(t)
	// Two writers do not know of each other's blobs until they flush.
	writers := []*Writer{r.NewWriter(t.Context(), WriterOptions{}), r.NewWriter(t.Context(), WriterOptions{})}
	for i := range n {
		b := randomBytes(rng, size(i))
		blobs = append(blobs, b)
		for _, w := range writers {
			if _, err := w.SaveBlob(t.Context(), KindMeta, b); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, w := range writers {
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range r.Locations(BlobHandle{Type: DataBlob, ID: Hash(blobs[0])}) {
		packs = append(packs, l.Pack)
	}
	if len(packs) != 2 {
		t.Fatalf("packs %v", packs)
	}
	return r, dir, blobs, packs
}

func packFile(dir string, id ID) string {
	return filepath.Join(dir, "data", id.String()[:2], id.String())
}

func TestAnotherCopyIsUsedWhenOneIsBadOrGone(t *testing.T) {
	r, dir, blobs, packs := twoCopies(t, 20, func(i int) int { return 1000 * i })
	damage(t, packFile(dir, packs[0]), func(b []byte) []byte {
		for i := 0; i < len(b); i += 40 {
			b[i] ^= 1
		}
		return b
	})
	check := func() {
		t.Helper()
		for _, b := range blobs {
			got, err := r.LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: Hash(b)}, KindData)
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		}
		got, err := loadAll(t, r, packs[0], blobs)
		if err != nil {
			t.Error(err)
		}
		for _, b := range blobs {
			if !bytes.Equal(got[Hash(b)], b) {
				t.Errorf("a blob of %d bytes came as %d", len(b), len(got[Hash(b)]))
			}
		}
	}
	check()
	if err := os.Remove(packFile(dir, packs[0])); err != nil {
		t.Fatal(err)
	}
	check()
}

// loadAll loads blobs from one pack through LoadPackBlobs.
func loadAll(t testing.TB, r *Repository, pack ID, blobs [][]byte) (map[ID][]byte, error) {
	t.Helper()
	got := map[ID][]byte{}
	err := r.LoadPackBlobs(t.Context(), pack, locate(t, r, pack, blobs), func(h BlobHandle, data []byte, err error) error {
		if _, twice := got[h.ID]; twice {
			t.Errorf("%s came twice", h)
		}
		got[h.ID] = bytes.Clone(data)
		return err
	})
	return got, err
}

func locate(t testing.TB, r *Repository, pack ID, blobs [][]byte) (out []BlobLocation) {
	t.Helper()
	for _, b := range blobs {
		h := BlobHandle{Type: DataBlob, ID: Hash(b)}
		locations := slices.DeleteFunc(r.Locations(h), func(l Location) bool { return l.Pack != pack })
		if len(locations) != 1 {
			t.Fatalf("%s: %v", h, locations)
		}
		out = append(out, blobAt(h, locations[0]))
	}
	return out
}

func TestBlobsOfAPackAreLoadedWithFewRequests(t *testing.T) {
	_, dir, blobs, packs := twoCopies(t, 200, func(i int) int { return 10_000 + i })
	be := faulty.New(openLocal(t, dir))
	r, err := Open(t.Context(), be, testPassword, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	requests := func(blobs [][]byte) int {
		before := be.Count(faulty.Load)
		got, err := loadAll(t, r, packs[0], blobs)
		if err != nil || len(got) != len(blobs) {
			t.Errorf("%d of %d, %v", len(got), len(blobs), err)
		}
		for _, b := range blobs {
			if !bytes.Equal(got[Hash(b)], b) {
				t.Errorf("a blob of %d bytes came as %d", len(b), len(got[Hash(b)]))
			}
		}
		return be.Count(faulty.Load) - before
	}
	for name, c := range map[string]struct {
		blobs [][]byte
		want  int
	}{
		"all": {blobs, 1}, "gap of 50 KB": {[][]byte{blobs[0], blobs[6]}, 1}, "gap of 500 KB": {[][]byte{blobs[0], blobs[50]}, 2},
		"none": {nil, 0}, "out of order": {[][]byte{blobs[7], blobs[3], blobs[5]}, 1},
	} {
		if got := requests(c.blobs); got != c.want {
			t.Errorf("%s: %d requests, want %d", name, got, c.want)
		}
	}
}

func TestBlobsComeOnceAlthoughTheStoreBreaksOffAndIsAskedAgain(t *testing.T) {
	_, dir, blobs, packs := twoCopies(t, 50, func(i int) int { return 10_000 + i })
	be := faulty.New(openLocal(t, dir))
	r, err := Open(t.Context(), retry.New(be, retry.Options{FirstWait: time.Millisecond}), testPassword, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	be.Inject(faulty.Rule{Ops: faulty.Load, Times: 1, Where: faulty.Truncate, Keep: 123_456})
	be.Inject(faulty.Rule{Ops: faulty.Load, Skip: 1, Times: 1, Where: faulty.Truncate, Keep: 300_000})
	before := be.Count(faulty.Load)
	got, err := loadAll(t, r, packs[0], blobs)
	if err != nil || len(got) != len(blobs) || be.Count(faulty.Load)-before != 3 {
		t.Errorf("%d of %d with %d requests, %v", len(got), len(blobs), be.Count(faulty.Load)-before, err)
	}
	for _, b := range blobs {
		if !bytes.Equal(got[Hash(b)], b) {
			t.Errorf("a blob of %d bytes came as %d", len(b), len(got[Hash(b)]))
		}
	}
}

func TestTheCallersErrorEndsReadingAtOnce(t *testing.T) {
	r, _, blobs, packs := twoCopies(t, 10, func(int) int { return 1000 })
	stop := errors.New("stop")
	calls := 0
	err := r.LoadPackBlobs(t.Context(), packs[0], locate(t, r, packs[0], blobs), func(BlobHandle, []byte, error) error {
		if calls++; calls == 3 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || calls != 3 {
		t.Errorf("%d calls, %v", calls, err)
	}
}
