// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// spoil changes n blocks of a copy of the image: it flips a bit, puts data
// where zeros are, and zeros where data are. It returns the blocks that differ.
func (f *fixture) spoil(image []byte, n int) (spoilt []byte, differ []kernel.Extent) {
	size := int64(len(image))
	spoilt = slices.Clone(image)
	for range n {
		off := f.rnd.Int64N(kernel.BlocksOf(size)) * kernel.BlockSize
		block := spoilt[off:min(off+kernel.BlockSize, size)]
		if f.rnd.IntN(3) == 0 {
			clear(block)
		} else {
			block[f.rnd.IntN(len(block))] ^= 1 << f.rnd.IntN(8)
		}
	}
	for off := int64(0); off < size; off += kernel.BlockSize {
		end := min(off+kernel.BlockSize, size)
		if !bytes.Equal(spoilt[off:end], image[off:end]) {
			differ = append(differ, kernel.Extent{Offset: off, Length: end - off})
		}
	}
	return spoilt, kernel.Align(differ, size)
}

func TestCompareWritesExactlyTheBlocksThatDiffer(t *testing.T) {
	f := newFixture(t, seed(t), 10<<20+4095)
	f.first(3)
	s := f.backup(2, f.mutate()...)
	size := int64(len(s.image))
	for _, n := range []int{0, 1, 100} {
		spoilt, differ := f.spoil(s.image, n)
		var zeros int64
		for _, e := range differ {
			for off := e.Offset; off < e.End(); off += kernel.BlockSize {
				// The device's last block, if it is short, counts as written.
				if end := off + kernel.BlockSize; end <= size && blocksum.IsZero(s.image[off:end]) {
					zeros += kernel.BlockSize
				}
			}
		}
		file := f.newFile()
		f.must(os.WriteFile(file, spoilt, 0o600))
		loop := f.loop(size/512*512 + 512)
		tail := f.content(loop)[size:]
		f.must(os.WriteFile(loop, spoilt, 0o600))
		for target, want := range map[string][]byte{file: s.image, loop: append(slices.Clone(s.image), tail...)} {
			got, err := Verify(t.Context(), f.store, VerifyOptions{Device: s.device, Target: target})
			f.must(err)
			if !slices.Equal(got, differ) {
				t.Errorf("verify of %s finds %v, what differs is %v", target, got, differ)
			}
			res := f.restore(Options{Device: s.device, Target: target, Force: true, Verify: true})
			if all := kernel.TotalLength(differ); res.BytesWritten != all-zeros || res.BytesZeroed != zeros || res.BytesSkipped != size-all {
				t.Errorf("%s: %d bytes written and %d zeroed, want %d and %d", target, res.BytesWritten, res.BytesZeroed, all-zeros, zeros)
			}
			if n == 0 && res.BytesFetched != 0 {
				t.Errorf("%d bytes were fetched for nothing", res.BytesFetched)
			}
			f.same(target, f.content(target), want)
		}
	}
}

func TestVerifyOfAShorterTargetCountsWhatItLacks(t *testing.T) {
	f := newFixture(t, seed(t), 4<<20)
	s := f.first(1)
	file := f.newFile()
	f.must(os.WriteFile(file, s.image[:3<<20+100], 0o600))
	got, err := Verify(t.Context(), f.store, VerifyOptions{Device: s.device, Target: file})
	f.must(err)
	if want := []kernel.Extent{{Offset: 3 << 20, Length: 1 << 20}}; !slices.Equal(got, want) {
		t.Errorf("verify finds %v, want %v", got, want)
	}
}

func TestVerifyReadsBackWhatWasWritten(t *testing.T) {
	f := newFixture(t, seed(t), 4<<20)
	s := f.first(1)
	file := f.newFile()
	spoilt, differ := f.spoil(s.image, 5)
	_, err := Restore(t.Context(), f.store, Options{Device: s.device, Target: file, Verify: true, Progress: func(p Progress) {
		if p.Phase == PhaseVerifying && p.Done == 0 { // the disk has a bad day
			f.must(os.WriteFile(file, spoilt, 0o600))
		}
	}})
	var d *DifferError
	if !errors.As(err, &d) || !slices.Equal(d.Ranges, differ) {
		t.Errorf("verify says %v, what differs is %v", err, differ)
	}
}

// shortWriter takes n bytes, then less than it is given.
type shortWriter struct{ left int }

func (w *shortWriter) Write(p []byte) (int, error) {
	n := min(len(p), w.left)
	w.left -= n
	return n, nil
}

func TestDumpSaysWhereTheOutputEnded(t *testing.T) {
	f := newFixture(t, seed(t), 4<<20)
	s := f.first(1)
	n, err := Dump(t.Context(), f.store, &shortWriter{1<<20 + 77}, DumpOptions{Device: s.device})
	if n != 1<<20+77 || !errors.Is(err, io.ErrShortWrite) || !strings.Contains(err.Error(), "after 1048653 bytes") {
		t.Errorf("after %d bytes: %v", n, err)
	}
	r, w, err := os.Pipe()
	f.must(err)
	defer w.Close()
	f.must(r.Close())
	n, err = Dump(t.Context(), f.store, w, DumpOptions{Device: s.device})
	if n != 0 || !errors.Is(err, unix.EPIPE) {
		t.Errorf("after %d bytes: %v", n, err)
	}
}

func TestStockResticDumpsTheDataThatTheIndexTellsOf(t *testing.T) {
	f := newFixture(t, seed(t), 6<<20)
	s := f.first(3)
	programs := []string{os.Getenv("RESTIC_014"), os.Getenv("RESTIC_018")}
	for i, name := range []string{"restic", "../.build/restic-0.18"} {
		if programs[i] == "" {
			programs[i] = name
		}
	}
	parts, err := f.repo.LoadTree(t.Context(), *f.layers[0].Subtree)
	f.must(err)
	var told int64
	for _, part := range parts.Nodes {
		files, err := f.repo.LoadTree(t.Context(), *part.Subtree)
		f.must(err)
		raw, err := layer.ReadFile(t.Context(), f.store, files.Find("index"))
		f.must(err)
		x, err := blockindex.Decode(raw)
		f.must(err)
		for _, restic := range programs {
			restic, err := filepath.Abs(mustLook(t, restic))
			f.must(err)
			path := fmt.Sprintf("%s/layers/%s/%s/data", deviceName, f.layers[0].Name, part.Name)
			cmd := exec.CommandContext(t.Context(), restic, "--no-cache", "-r", f.dir, "dump", s.device.Snapshot.String(), path)
			cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+testPassword)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			data, err := cmd.Output()
			if err != nil {
				t.Fatalf("%s: %v: %s", cmd, err, stderr.Bytes())
			}
			for _, e := range x.Extents {
				if e.Zero {
					told += e.Length
					f.same("zeros", s.image[e.Offset:e.End()], make([]byte, e.Length))
					continue
				}
				told += e.Length
				f.same(fmt.Sprintf("extent at %d", e.Offset), data[e.Data:e.Data+e.Length], s.image[e.Offset:e.End()])
			}
		}
	}
	if told != int64(len(programs)*len(s.image)) {
		t.Errorf("the index tells of %d bytes of %d", told/int64(len(programs)), len(s.image))
	}
}

func mustLook(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("the tests need stock restic 0.14 and 0.18 (RESTIC_014, RESTIC_018 name them): %v", err)
	}
	return path
}
