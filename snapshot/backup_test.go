// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

func newRepo(t testing.TB) *repo.Repository {
	t.Helper()
	be, err := local.Open(t.TempDir(), local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := repo.Init(t.Context(), be, "geheim", repo.Options{KDF: repo.KDFParams{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// imageFile is a plain file to back up, and the clock of its backups.
type imageFile struct {
	t    testing.TB
	r    *repo.Repository
	path string
	now  time.Time
}

func newImage(t testing.TB, size int) *imageFile {
	f := &imageFile{t: t, r: newRepo(t), path: filepath.Join(t.TempDir(), "disk.img"), now: time.Unix(1e9, 0)}
	f.resize(int64(size))
	return f
}

func (f *imageFile) resize(size int64) {
	file, err := os.OpenFile(f.path, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = errors.Join(file.Truncate(size), file.Close())
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *imageFile) write(off int64, b []byte) {
	file, err := os.OpenFile(f.path, os.O_RDWR, 0)
	if err == nil {
		_, err = file.WriteAt(b, off)
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *imageFile) content() []byte {
	b, err := os.ReadFile(f.path)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

func (f *imageFile) try(change func(*Options)) (*Summary, error) {
	return f.tryIn(f.t.Context(), change)
}

func (f *imageFile) tryIn(ctx context.Context, change func(*Options)) (*Summary, error) {
	d, err := device.Open(f.path, device.Options{})
	if err != nil {
		f.t.Fatal(err)
	}
	defer d.Close()
	f.now = f.now.Add(time.Hour)
	o := Options{Device: d, Name: "/vm/disk", Host: "here", Time: f.now, Instant: Still(PointInTimeFile), Warn: func(err error) { f.t.Log(err) }}
	if change != nil {
		change(&o)
	}
	return Backup(ctx, f.r, o)
}

func (f *imageFile) backup(change func(*Options)) *Summary {
	f.t.Helper()
	s, err := f.try(change)
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

// chain opens the layers of a snapshot.
func (f *imageFile) chain(id repo.ID) ([]*layer.Layer, *Manifest) {
	f.t.Helper()
	ctx, from := f.t.Context(), Store{f.r}
	sn, err := f.r.LoadSnapshot(ctx, id)
	if err != nil {
		f.t.Fatal(err)
	}
	devices, err := Devices(ctx, from, id, sn)
	if err != nil {
		f.t.Fatal(err)
	}
	layers, err := layer.Open(ctx, from, devices[0].Manifest.Layers)
	if err != nil {
		f.t.Fatal(err)
	}
	return layers, devices[0].Manifest
}

// restored reads a snapshot back block by block.
func (f *imageFile) restored(id repo.ID) []byte {
	f.t.Helper()
	ctx, from := f.t.Context(), Store{f.r}
	layers, manifest := f.chain(id)
	out := make([]byte, manifest.Size)
	m := layer.NewMerger(from, layers, int64(len(out)))
	for {
		p, err := m.Next(ctx)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil || p.Missing {
			f.t.Fatalf("%+v %v", p, err)
		}
		for at, left := p.Data, p.Length; left > 0 && !p.Zero; {
			i, in, n := p.Part.Data.Locate(at)
			b, err := f.r.LoadBlob(ctx, repo.BlobHandle{Type: repo.DataBlob, ID: p.Part.Data.Blobs[i]}, repo.KindData)
			if err != nil {
				f.t.Fatal(err)
			}
			n = min(n, left)
			copy(out[p.Offset+at-p.Data:], b[in:in+n])
			at, left = at+n, left-n
		}
	}
}

func noise(rnd *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rnd.Uint64())
	}
	return b
}

func TestFirstBackupIsFullAndTheNextCompares(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	f := newImage(t, 16<<20)
	f.write(3<<20, noise(rnd, 2<<20))
	one := f.content()
	s1 := f.backup(nil)
	if s1.Changes != ChangesFull || s1.Parent != nil || s1.BytesRead != 2<<20 || s1.DirtyBytes != 16<<20 || s1.Layers != 1 {
		t.Errorf("first: %+v", s1)
	}
	f.write(9<<20+100, noise(rnd, 5000))
	s2 := f.backup(nil)
	if s2.Changes != ChangesCompare || s2.Parent == nil || *s2.Parent != s1.SnapshotID || s2.DirtyBytes != 8192 || s2.Layers != 2 {
		t.Errorf("second: %+v", s2)
	}
	s3 := f.backup(nil)
	if s3.DirtyBytes != 0 || s3.DataAdded != 0 || s3.Layers != 2 {
		t.Errorf("third: %+v", s3)
	}
	if !bytes.Equal(f.restored(s1.SnapshotID), one) || !bytes.Equal(f.restored(s3.SnapshotID), f.content()) {
		t.Error("a snapshot does not give back what was backed up")
	}
}

func TestRangesAreBelievedAndATailIsAdded(t *testing.T) {
	rnd := rand.New(rand.NewPCG(2, 1))
	f := newImage(t, 4<<20+512)
	f.write(0, noise(rnd, 4<<20+512))
	if _, err := f.try(func(o *Options) { o.Changes = ChangesRanges }); err == nil || !strings.Contains(err.Error(), "--changes full") {
		t.Errorf("ranges without a snapshot: %v", err)
	}
	f.backup(nil)
	f.write(1<<20, noise(rnd, 4096))
	f.resize(5 << 20)
	f.write(5<<20-10, []byte("tail"))
	s := f.backup(func(o *Options) {
		o.Changes, o.Ranges = ChangesRanges, []kernel.Extent{{Offset: 1 << 20, Length: 4096}}
	})
	if s.Changes != ChangesRanges || s.DirtyBytes != 4096+1<<20 {
		t.Errorf("%+v", s)
	}
	if !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
		t.Error("the snapshot does not give back what was backed up")
	}
}

func TestShrunkAndGrownAgainShowsNothingOld(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 1))
	f := newImage(t, 4<<20)
	f.write(0, noise(rnd, 4<<20))
	f.backup(nil)
	f.resize(1<<20 + 700)
	f.backup(nil)
	f.resize(4 << 20)
	for _, changes := range []Changes{ChangesRanges, ChangesCompare} {
		s := f.backup(func(o *Options) { o.Changes = changes })
		if !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
			t.Errorf("%s: the snapshot does not give back what was backed up", changes)
		}
	}
}

func TestSnapshotIsFoundWithoutItsTag(t *testing.T) {
	f := newImage(t, 1<<20)
	s := f.backup(nil)
	sn, _ := f.r.LoadSnapshot(t.Context(), s.SnapshotID)
	sn.Tags = nil
	if err := f.r.RemoveSnapshot(t.Context(), s.SnapshotID); err != nil {
		t.Fatal(err)
	}
	id, _, err := f.r.SaveSnapshot(t.Context(), sn)
	if err != nil {
		t.Fatal(err)
	}
	if s := f.backup(nil); s.Parent == nil || *s.Parent != id {
		t.Errorf("%+v", s)
	}
}

func TestFailedReadLeavesNoSnapshot(t *testing.T) {
	f := newImage(t, 64<<20)
	f.write(0, noise(rand.New(rand.NewPCG(5, 1)), 64<<20))
	gone := errors.New("no longer standing still")
	_, err := f.try(func(o *Options) { o.Instant = falling{gone} })
	if !errors.Is(err, gone) {
		t.Error(err)
	}
	_ = f.r.ListSnapshots(t.Context(), func(id repo.ID, _ *repo.Snapshot, _ error) error {
		t.Errorf("snapshot %s is there", id)
		return nil
	})
}

// falling is an Instant that ends before the copy does.
type falling struct{ cause error }

func (falling) Kind() PointInTime { return PointInTimeFreeze }

func (f falling) Begin(ctx context.Context) (context.Context, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	cancel(f.cause)
	return ctx, nil
}
func (falling) End() (time.Duration, error) { return time.Second, nil }

func TestManifestIsReadAsWritten(t *testing.T) {
	m := &Manifest{
		Version: 1, Device: "/dev/vdb", Size: 1 << 30, BlockSize: 4096, SumKey: SumKey{1, 2}, Changes: ChangesTracker,
		PointInTime: PointInTimeFreeze, Position: &kernel.Position{Tracker: kernel.NewUUID(), Epoch: 7, Nonce: kernel.NewNonce()},
		Layers: repo.Hash([]byte("x")),
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseManifest(b)
	if err != nil || *got.Position != *m.Position || got.SumKey != m.SumKey || got.Layers != m.Layers || got.Size != m.Size {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := ParseManifest([]byte(`{"version":2,"block_size":4096}`)); err == nil || !strings.Contains(err.Error(), "update") {
		t.Errorf("newer version: %v", err)
	}
	if _, err := ParseManifest([]byte(`{"version":1,"block_size":512}`)); !errors.Is(err, layer.ErrDamaged) {
		t.Errorf("other blocks: %v", err)
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"version":1,"size":1,"block_size":4096,"position":{"tracker":"00","epoch":1},"sum_key":"00"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := ParseManifest(b); err == nil && m.Validate() != nil {
			t.Fatal("accepted what is not valid")
		}
	})
}

func TestParseRanges(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		name, in, want string // want is the error, or "" for OK
	}{
		{"OK", "{\"offset\":0,\"length\":1}\n\n{\"offset\":8192,\"length\":4096}\n", ""},
		{"Empty", "", ""},
		{"NoJSON", "0 4096", "line 1"},
		{"SecondLine", "{\"offset\":0,\"length\":1}\n{}", "line 2"},
		{"Outside", `{"offset":1048576,"length":1}`, "not inside"},
		{"Overflow", `{"offset":9223372036854775807,"length":9223372036854775807}`, "not inside"},
		{"Negative", `{"offset":-1,"length":1}`, "not inside"},
		{"Fraction", `{"offset":1.5,"length":1}`, "line 1"},
		{"TooLong", strings.Repeat(" ", 1<<20) + "x", "too long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseRanges(strings.NewReader(c.in), size)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, %v", got, err)
			}
			if c.name == "OK" && (len(got) != 2 || got[0].Length != 4096) {
				t.Errorf("%v", got)
			}
		})
	}
}

func TestCleanName(t *testing.T) {
	for in, want := range map[string]string{"/dev/vda": "/dev/vda", "/vm/a/": "/vm/a", "x": "", "/": "", "/a/../b": "", "/a//b": "", "": ""} {
		got, err := CleanName(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestWithHolesReadsOnlyData(t *testing.T) {
	rnd := rand.New(rand.NewPCG(6, 1))
	for range 200 {
		const blocks = 64
		dirty, data := kernel.NewBitmap(blocks), kernel.NewBitmap(blocks)
		for i := range int64(blocks) {
			if rnd.IntN(2) == 0 {
				dirty.Set(i)
			}
			if rnd.IntN(3) == 0 {
				data.Set(i)
			}
		}
		read, hole := kernel.NewBitmap(blocks), kernel.NewBitmap(blocks)
		for r := range withHoles(bitmapRanges(dirty, blocks*4096), data.Extents(blocks*4096)) {
			b := read
			if r.Hole {
				b = hole
			}
			b.SetRange(r.Offset/4096, r.End()/4096-1)
		}
		for i := range int64(blocks) {
			if read.Get(i) != (dirty.Get(i) && data.Get(i)) || hole.Get(i) != (dirty.Get(i) && !data.Get(i)) {
				t.Fatalf("block %d", i)
			}
		}
	}
}
