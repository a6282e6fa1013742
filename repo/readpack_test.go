// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"os"
	"runtime"
	"testing"
)

// TestAPackIsInMemoryOnce: a check reads many packs at a time, each as large as the user
// wants packs to be.
func TestAPackIsInMemoryOnce(t *testing.T) {
	r, dir := newRepo(t, Options{PackSize: 64 << 20, Compression: CompressionOff})
	rng := newRand(t)
	w := r.NewWriter(t.Context(), WriterOptions{})
	var h BlobHandle
	for range 40 {
		b := randomBytes(rng, 1<<20)
		if _, err := w.SaveBlob(t.Context(), KindData, b); err != nil {
			t.Fatal(err)
		}
		h = BlobHandle{Type: DataBlob, ID: Hash(b)}
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	pack := r.Locations(h)[0].Pack
	fi, err := os.Stat(packFile(dir, pack))
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	rep, err := r.ReadPack(t.Context(), pack, fi.Size(), nil)
	runtime.ReadMemStats(&after)
	if err != nil || rep.Problem != "" || len(rep.Bad) > 0 || len(rep.Blobs) != 40 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > uint64(fi.Size())+4<<20 {
		t.Errorf("a pack of %d bytes took %d bytes of memory", fi.Size(), took)
	}
	// A size that is wrong costs memory, and nothing else.
	for _, size := range []int64{0, 1000, fi.Size() + 1} {
		if rep, err := r.ReadPack(t.Context(), pack, size, nil); err != nil || rep.Problem != "" || len(rep.Blobs) != 40 {
			t.Errorf("size %d: %+v, %v", size, rep, err)
		}
	}
}
