// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
)

// dirSize sums the files below a directory.
func dirSize(t testing.TB, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		n += info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestConcurrentSavesOfTheSameBlobsStoreEachOnce(t *testing.T) {
	r, dir := newRepo(t, Options{PackSize: MinPackSize, CacheDir: t.TempDir()})
	rng := newRand(t)
	blobs := make([][]byte, 200)
	for i := range blobs {
		blobs[i] = randomBytes(rng, rng.IntN(200_000)+i)
	}
	before := dirSize(t, dir)
	w := r.NewWriter(t.Context(), WriterOptions{})
	w.indexBlobs = 50 // so that blobs become visible while others are saved
	var fresh, stored atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		order := rng.Perm(len(blobs))
		wg.Go(func() {
			buf := []byte(nil)
			for _, i := range order {
				// The buffer is overwritten at once: nothing may be kept of it.
				buf = append(buf[:0], blobs[i]...)
				s, err := w.SaveBlob(t.Context(), Kind(i%2), buf)
				clear(buf)
				if err != nil {
					t.Error(err)
					return
				}
				if s.ID != Hash(blobs[i]) || s.PlainSize != len(blobs[i]) {
					t.Errorf("blob %d: %+v", i, s)
				}
				if !s.Known {
					fresh.Add(1)
					stored.Add(int64(s.StoredSize))
				}
			}
		})
	}
	wg.Wait()
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := fresh.Load(); n != int64(len(blobs)) {
		t.Errorf("%d blobs were new, want %d", n, len(blobs))
	}
	stats := w.Stats()
	if got, want := stats.Data.StoredBytes+stats.Meta.StoredBytes+stats.Tree.StoredBytes+stats.IndexBytes, dirSize(t, dir)-before; got != want {
		t.Errorf("counted %d stored bytes, the repository grew by %d", got, want)
	}
	overhead := int64(stats.Data.Packs+stats.Meta.Packs) * 36
	if got := stats.Data.StoredBytes + stats.Meta.StoredBytes; stored.Load()+overhead != got {
		t.Errorf("blobs took %d bytes, packs %d", stored.Load(), got)
	}
	if n := len(w.inFlight); n != 0 {
		t.Errorf("%d blobs are still in flight after a flush", n)
	}
	again := reopen(t, dir, Options{})
	for i, b := range blobs {
		h := BlobHandle{Type: DataBlob, ID: Hash(b)}
		if n := len(again.Locations(h)); n != 1 {
			t.Errorf("blob %d is stored %d times", i, n)
		}
		if size, ok := again.BlobSize(h); !ok || size != len(b) {
			t.Errorf("blob %d has %d bytes, want %d", i, size, len(b))
		}
		if got, err := again.LoadBlob(t.Context(), h, KindData); err != nil || !bytes.Equal(got, b) {
			t.Errorf("blob %d: %d bytes, %v", i, len(got), err)
		}
	}
	mustCheckClean(t, dir)
}

func TestKnownBlobsAreNotStoredAgain(t *testing.T) {
	r, dir := newRepo(t, Options{})
	data := randomBytes(newRand(t), 1000)
	for i := range 3 {
		w := r.NewWriter(t.Context(), WriterOptions{})
		s, err := w.SaveBlob(t.Context(), KindData, data)
		if err != nil || s.Known != (i > 0) {
			t.Fatalf("round %d: %+v, %v", i, s, err)
		}
		size := dirSize(t, dir)
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if grown := dirSize(t, dir) > size; grown != (i == 0) {
			t.Errorf("round %d: grown is %v", i, grown)
		}
		if i == 1 {
			r = reopen(t, dir, Options{})
		}
	}
	// The same bytes as a tree are another blob.
	if r.Has(BlobHandle{Type: TreeBlob, ID: Hash(data)}) {
		t.Error("a data blob passes for a tree")
	}
}

func TestBlobsInFlightOfOneWriterAreNotKnownToAnother(t *testing.T) {
	r, _ := newRepo(t, Options{})
	a, b := r.NewWriter(t.Context(), WriterOptions{}), r.NewWriter(t.Context(), WriterOptions{})
	for _, w := range []*Writer{a, b} {
		if s, err := w.SaveBlob(t.Context(), KindData, []byte("x")); err != nil || s.Known {
			t.Fatalf("%+v, %v", s, err)
		}
	}
	if err := b.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := reopen(t, r.be.Location(), Options{}).LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: Hash([]byte("x"))}, KindData); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestDataMetadataAndTreesNeverShareAPack(t *testing.T) {
	r, _ := newRepo(t, Options{})
	w := r.NewWriter(t.Context(), WriterOptions{})
	kinds := map[BlobHandle]Kind{}
	for i := range byte(30) {
		k := Kind(i % 3)
		s, err := w.SaveBlob(t.Context(), k, []byte{i})
		if err != nil {
			t.Fatal(err)
		}
		kinds[BlobHandle{Type: k.BlobType(), ID: s.ID}] = k
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	of := map[ID]Kind{}
	for h, k := range kinds {
		loc, ok := r.Lookup(h)
		if !ok {
			t.Fatalf("%s is not there", h)
		}
		if other, seen := of[loc.Pack]; seen && other != k {
			t.Errorf("pack %s holds %s and %s", loc.Pack.Str(), k, other)
		}
		of[loc.Pack] = k
	}
	if len(of) != 3 {
		t.Errorf("%d packs, want 3", len(of))
	}
}

func TestPacksKeepToTheirSize(t *testing.T) {
	for _, size := range []int{MinPackSize, 5 << 20} {
		r, _ := newRepo(t, Options{PackSize: size, Compression: CompressionOff})
		rng := newRand(t)
		w := r.NewWriter(t.Context(), WriterOptions{})
		for range 60 {
			if _, err := w.SaveBlob(t.Context(), KindData, randomBytes(rng, 1+rng.IntN(900_000))); err != nil {
				t.Fatal(err)
			}
		}
		big, err := w.SaveBlob(t.Context(), KindData, randomBytes(rng, size+1))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		loc, _ := r.Lookup(BlobHandle{Type: DataBlob, ID: big.ID})
		small := 0
		err = r.be.List(t.Context(), backend.PackFile, func(fi backend.FileInfo) error {
			if fi.Size > int64(size) && fi.Name != loc.Pack.String() {
				t.Errorf("a pack has %d bytes, the limit is %d", fi.Size, size)
			}
			if fi.Size < int64(size)-1<<20 {
				small++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if small > 3 { // the last of each of the two open ones, and what gave way to the big blob
			t.Errorf("%d packs are not full", small)
		}
	}
}

// Whatever fails in whatever order: no index lists what is not there, no flush
// succeeds, and the repository stays clean.
func TestAFailingStoreLeavesACleanRepository(t *testing.T) {
	boom := errors.New("store is broken")
	for _, target := range []backend.FileType{backend.PackFile, backend.IndexFile} {
		for after := range 4 {
			where := faulty.Before
			if after%2 == 1 {
				where = faulty.After // the file is there, but we are not told
			}
			dir := filepath.Join(t.TempDir(), "repo")
			be := faulty.New(openLocal(t, dir))
			r, err := Init(t.Context(), be, testPassword, Options{PackSize: MinPackSize, KDF: lightKDF})
			if err != nil {
				t.Fatal(err)
			}
			w := r.NewWriter(t.Context(), WriterOptions{})
			w.indexBlobs = 5
			be.Inject(faulty.Rule{Ops: faulty.Save, Types: []backend.FileType{target}, Skip: after / 2, Where: where, Err: boom})
			rng := rand.New(rand.NewPCG(1, uint64(after)))
			for range 60 {
				if _, err = w.SaveBlob(t.Context(), KindData, randomBytes(rng, 1_000_000)); err != nil {
					break
				}
			}
			if err := w.Flush(t.Context()); !errors.Is(err, boom) {
				t.Errorf("%s, %d: flush says %v", target, after, err)
			}
			if _, err := w.SaveBlob(t.Context(), KindData, []byte("more")); !errors.Is(err, boom) {
				t.Errorf("%s, %d: a failed writer goes on: %v", target, after, err)
			}
			be.Heal()
			mustListOnlyWhatIsThere(t, dir)
			// What an index lists is known to the next writer, the rest is not.
			again := reopen(t, dir, Options{})
			testBackup(t, again, rng)
			mustCheckCleanOnce(t, dir)
		}
	}
}

// mustListOnlyWhatIsThere looks for index entries of packs that are missing.
func mustListOnlyWhatIsThere(t testing.TB, dir string) {
	t.Helper()
	r := reopen(t, dir, Options{})
	err := r.EachBlob(t.Context(), func(h BlobHandle, l Location) error {
		info, err := r.be.Stat(t.Context(), packHandle(l.Pack))
		if err == nil && int64(l.Offset)+int64(l.Length) > info.Size {
			t.Errorf("%s lies outside of its pack", h)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// mustCheckCleanOnce is mustCheckClean with the newer restic only.
func mustCheckCleanOnce(t testing.TB, dir string) {
	t.Helper()
	restics := stockRestics(t)
	restics[len(restics)-1].run(t, dir, "check", "--read-data")
}

func TestCancelledWriterFailsForGood(t *testing.T) {
	r, dir := newRepo(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	w := r.NewWriter(ctx, WriterOptions{})
	if _, err := w.SaveBlob(ctx, KindData, []byte("x")); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := w.Flush(t.Context()); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "index")); err != nil || len(entries) > 0 {
		t.Errorf("%d index files, %v", len(entries), err)
	}
}

// A blob that one call gave up on may have been called known to another: the
// writer must not pretend that all is well.
func TestAGivenUpSaveFailsTheWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	be := faulty.New(openLocal(t, dir))
	r, err := Init(t.Context(), be, testPassword, Options{PackSize: MinPackSize, Compression: CompressionOff, KDF: lightKDF})
	if err != nil {
		t.Fatal(err)
	}
	be.Inject(faulty.Rule{Ops: faulty.Save, Delay: time.Second})
	w := r.NewWriter(t.Context(), WriterOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	data := make([]byte, 3<<20)
	for i := 0; err == nil; i++ { // until there is no memory for more packs
		if i == 10_000 {
			t.Fatal("the packs that wait for the store have no limit")
		}
		data[0], data[1] = byte(i), byte(i>>8)
		_, err = w.SaveBlob(ctx, KindData, data)
	}
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := w.Flush(t.Context()); !errors.Is(err, context.Canceled) {
		t.Errorf("flush after a save that was given up: %v", err)
	}
}

func TestVersion1IsReadAndNotWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	stockRestics(t)[1].run(t, dir, "init", "--repository-version", "1")
	r := reopen(t, dir, Options{})
	w := r.NewWriter(t.Context(), WriterOptions{})
	_, err := w.SaveBlob(t.Context(), KindData, []byte("x"))
	_, _, snapErr := r.SaveSnapshot(t.Context(), &Snapshot{Tree: &ID{}})
	for _, err := range []error{err, snapErr, w.Flush(t.Context()), r.RequireWritable()} {
		if !errors.Is(err, ErrVersion1) || !bytes.Contains([]byte(err.Error()), []byte("restic migrate upgrade_repo_v2")) {
			t.Error(err)
		}
	}
	if n := len(indexFiles(t, r)); n != 0 {
		t.Errorf("%d index files were written", n)
	}
}

func BenchmarkSaveBlob(b *testing.B) {
	for _, c := range []Compression{CompressionAuto, CompressionOff} {
		b.Run(string(c), func(b *testing.B) {
			r, _ := newRepo(b, Options{Compression: c})
			w := r.NewWriter(b.Context(), WriterOptions{})
			rng := rand.New(rand.NewPCG(1, 1))
			data := randomBytes(rng, 1<<20)
			var n atomic.Uint64
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				mine := bytes.Clone(data)
				for pb.Next() {
					i := n.Add(1)
					for j := range 8 {
						mine[j] = byte(i >> (8 * j))
					}
					if _, err := w.SaveBlob(b.Context(), KindData, mine); err != nil {
						b.Error(err)
						return
					}
				}
			})
			if err := w.Flush(b.Context()); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkWriterMemory reports the most heap that a full backup's writer takes
// over a slow store, sampled; its callers' buffers of 1 MiB each are included.
func BenchmarkWriterMemory(b *testing.B) {
	for _, packSize := range []int{DefaultPackSize, MaxPackSize} {
		b.Run(fmt.Sprintf("packs of %d MiB", packSize>>20), func(b *testing.B) {
			dir := filepath.Join(b.TempDir(), "repo")
			be := faulty.New(openLocal(b, dir))
			r, err := Init(b.Context(), be, testPassword, Options{Compression: CompressionOff, PackSize: packSize, KDF: lightKDF})
			if err != nil {
				b.Fatal(err)
			}
			be.Inject(faulty.Rule{Ops: faulty.Save, Delay: 100 * time.Millisecond})
			peak := uint64(0)
			for b.Loop() {
				w := r.NewWriter(b.Context(), WriterOptions{})
				var wg sync.WaitGroup
				for g := range uint64(4) {
					wg.Go(func() {
						data := make([]byte, 1<<20)
						rng := rand.New(rand.NewPCG(g, 0))
						for range 192 {
							binary.LittleEndian.PutUint64(data, rng.Uint64())
							if _, err := w.SaveBlob(b.Context(), KindData, data); err != nil {
								b.Error(err)
							}
						}
					})
				}
				done := make(chan struct{})
				go func() { wg.Wait(); close(done) }()
				for running := true; running; {
					select {
					case <-done:
						running = false
					case <-time.After(20 * time.Millisecond):
					}
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					peak = max(peak, m.HeapInuse)
				}
				if err := w.Flush(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(peak)/(1<<20), "peak-heap-MiB")
		})
	}
}
