// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

const sampleStatus = `version 1.0.0
device 253:3
name a name
uuid 000102030405060708090a0b0c0d0e0f
below 8:16 2048
epoch 5
pending 4 ff0102030405060708090a0b0c0d0e0f
pending_blocks 262143
block_size 4096
sectors 2097152
blocks 262144
dirty 17
pending_dirty 3
state invalid what was written  is not known
live 1
later something
`

func TestStatusIsParsed(t *testing.T) {
	got, err := parseRecord(sampleStatus)
	want := record{
		dev: unix.Mkdev(253, 3), name: "a name", below: unix.Mkdev(8, 16), offset: 2048, epoch: 5,
		uuid:    kernel.UUID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
		pending: true, pendingEpoch: 4, pendingBlocks: 262143, pendingDirty: 3,
		pendingNonce: kernel.Nonce{255, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
		sectors:      2097152, blocks: 262144, dirty: 17, invalid: "what was written  is not known", live: true,
	}
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	valid := strings.Replace(sampleStatus, "state invalid what was written  is not known", "state valid", 1)
	valid = strings.Replace(valid, "pending 4 ff0102030405060708090a0b0c0d0e0f", "pending -", 1)
	if r, err := parseRecord(valid); err != nil || r.invalid != "" || r.pending {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestStatusThatIsNotWholeIsRefused: what is not understood must not pass for
// valid.
func TestStatusThatIsNotWholeIsRefused(t *testing.T) {
	lines := strings.SplitAfter(strings.TrimSuffix(sampleStatus, "\n"), "\n")
	for i, line := range lines {
		key, _, _ := strings.Cut(line, " ")
		if slices.Contains([]string{"version", "name", "later"}, key) {
			continue // read elsewhere, or free
		}
		if r, err := parseRecord(strings.Join(slices.Delete(slices.Clone(lines), i, i+1), "")); err == nil {
			t.Errorf("without %q: %+v", key, r)
		}
		if r, err := parseRecord(strings.Replace(sampleStatus, line, key+" nonsense\n", 1)); err == nil {
			t.Errorf("with nonsense for %q: %+v", key, r)
		}
	}
	if r, err := parseRecord(strings.Replace(sampleStatus, "4096", "8192", 1)); err == nil {
		t.Errorf("with blocks of 8192 bytes: %+v", r)
	}
}

func TestReasonsAreQuoted(t *testing.T) {
	for in, want := range map[string]string{
		"plain words":         "plain words",
		" two  lines\nof\tit": "two lines of it",
		`a\b`:                 `a\\b`,
		"a\x00b\x7fc":         "a b c",
	} {
		if got := quote(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestBitmapsAreReadByWhatIsMarked reads sparse files, whose holes are found as
// the module's are.
func TestBitmapsAreReadByWhatIsMarked(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, blocks := range []int64{1, 7, 8, 9, 63, 64, 65, 32767, 32768, 32769, 1<<23 + 5, 1<<26 - 1, 1 << 26} {
		want := kernel.NewBitmap(blocks)
		file := make([]byte, (blocks+7)/8)
		f, err := os.Create(filepath.Join(t.TempDir(), "bits"))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(int64(len(file))); err != nil {
			t.Fatal(err)
		}
		for range rng.IntN(20) {
			first := rng.Int64N(blocks)
			for i := first; i < min(blocks, first+1+rng.Int64N(100_000)); i++ {
				want.Set(i)
				file[i/8] |= 1 << (i % 8)
			}
		}
		for page := int64(0); page < int64(len(file)); page += 4096 {
			piece := file[page:min(page+4096, int64(len(file)))]
			if slices.ContainsFunc(piece, func(b byte) bool { return b != 0 }) {
				if _, err := f.WriteAt(piece, page); err != nil {
					t.Fatal(err)
				}
			}
		}
		f.Close()
		got := kernel.NewBitmap(blocks)
		if err := addBits(filepath.Dir(f.Name()), "bits", got); err != nil {
			t.Fatal(err)
		}
		if !got.Equal(want) {
			t.Errorf("%d blocks: read %d, want %d", blocks, got.Count(), want.Count())
		}
		for _, length := range []int64{0, int64(len(file)) - 1, int64(len(file)) + 1} {
			if err := os.Truncate(f.Name(), length); err != nil {
				t.Fatal(err)
			}
			if err := addBits(filepath.Dir(f.Name()), "bits", kernel.NewBitmap(blocks)); !errors.Is(err, errChanged) {
				t.Errorf("%d blocks: a bitmap of %d bytes was taken: %v", blocks, length, err)
			}
		}
	}
}
