// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"cmp"
	"errors"
	"maps"
	"slices"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
)

// onePack makes a repository of one pack with n blobs, on a store that can be
// made to fail. The blobs are in the order of their offsets.
func onePack(t testing.TB, n int) (*Repository, *faulty.Backend, string, []BlobLocation, map[ID][]byte) {
	t.Helper()
	first, dir := newRepo(t, Options{Compression: CompressionOff})
	rng, want := newRand(t), map[ID][]byte{}
	w := first.NewWriter(t.Context(), WriterOptions{})
	var blobs [][]byte
	for range n {
		b := randomBytes(rng, 20_000)
		if _, err := w.SaveBlob(t.Context(), KindData, b); err != nil {
			t.Fatal(err)
		}
		blobs, want[Hash(b)] = append(blobs, b), b
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	be := faulty.New(openLocal(t, dir))
	r, err := Open(t.Context(), retry.New(be, retry.Options{}), testPassword, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	pack := r.Locations(BlobHandle{Type: DataBlob, ID: Hash(blobs[0])})[0].Pack
	located := locate(t, r, pack, blobs)
	slices.SortFunc(located, func(a, b BlobLocation) int { return cmp.Compare(a.Offset, b.Offset) })
	return r, be, packFile(dir, pack), located, want
}

// loadWhatIsThere loads the blobs and goes on where one is lost.
func loadWhatIsThere(t testing.TB, r *Repository, pack ID, blobs []BlobLocation) (map[ID][]byte, map[ID]error) {
	t.Helper()
	got, lost := map[ID][]byte{}, map[ID]error{}
	err := r.LoadPackBlobs(t.Context(), pack, blobs, func(h BlobHandle, data []byte, err error) error {
		if _, twice := got[h.ID]; twice || lost[h.ID] != nil {
			t.Errorf("%s came twice", h)
		}
		if err != nil {
			lost[h.ID] = err
		} else {
			got[h.ID] = bytes.Clone(data)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return got, lost
}

func TestABadPlaceCostsTheBlobThatItLiesInAndNoOther(t *testing.T) {
	r, be, _, blobs, want := onePack(t, 30)
	pack := r.Locations(blobs[0].Handle)[0].Pack
	bad := blobs[11]
	be.Break(packHandle(pack), int64(bad.Offset)+100, backend.Broken(syscall.EIO))
	before := be.Count(faulty.Load)
	got, lost := loadWhatIsThere(t, r, pack, blobs)
	if err := lost[bad.Handle.ID]; len(lost) != 1 || !errors.Is(err, backend.ErrBroken) || !errors.Is(err, syscall.EIO) {
		t.Errorf("lost %v", lost)
	}
	delete(want, bad.Handle.ID)
	if !maps.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("got %d blobs, want %d", len(got), len(want))
	}
	// Up to the bad place all at once, and from there on each by itself.
	if n := be.Count(faulty.Load) - before; n != 1+30-11 {
		t.Errorf("%d requests", n)
	}
}

func TestABadPlaceBetweenTheBlobsCostsNone(t *testing.T) {
	r, be, _, blobs, _ := onePack(t, 10)
	pack := r.Locations(blobs[0].Handle)[0].Pack
	be.Break(packHandle(pack), int64(blobs[4].Offset), backend.Broken(syscall.EIO))
	some := slices.Delete(blobs, 4, 5)
	if got, lost := loadWhatIsThere(t, r, pack, some); len(got) != 9 || len(lost) != 0 {
		t.Errorf("got %d blobs, lost %v", len(got), lost)
	}
}

func TestAPackThatIsCutShortGivesWhatIsStillInIt(t *testing.T) {
	r, _, file, blobs, want := onePack(t, 20)
	cut := blobs[15]
	damage(t, file, func(b []byte) []byte { return b[:cut.Offset+1] })
	got, lost := loadWhatIsThere(t, r, r.Locations(cut.Handle)[0].Pack, blobs)
	for _, b := range blobs[15:] {
		if !errors.Is(lost[b.Handle.ID], backend.ErrRange) {
			t.Errorf("%s: %v", b.Handle, lost[b.Handle.ID])
		}
		delete(want, b.Handle.ID)
	}
	if len(lost) != 5 || !maps.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("got %d blobs, lost %d", len(got), len(lost))
	}
}

func TestAStoreThatIsGoneIsNotAskedForEachBlob(t *testing.T) {
	r, be, _, blobs, _ := onePack(t, 10)
	pack := r.Locations(blobs[0].Handle)[0].Pack
	for _, gone := range []error{backend.NoStore(backend.PackFile, "gone"), backend.ErrNotExist} {
		be.Heal()
		be.Inject(faulty.Rule{Ops: faulty.Load, Where: faulty.Before, Err: gone})
		before := be.Count(faulty.Load)
		if _, lost := loadWhatIsThere(t, r, pack, blobs); len(lost) != 10 || be.Count(faulty.Load) != before+1 {
			t.Errorf("%v: lost %d blobs in %d requests", gone, len(lost), be.Count(faulty.Load)-before)
		}
	}
}
