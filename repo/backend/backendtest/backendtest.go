// SPDX-License-Identifier: BSD-2-Clause

// Package backendtest is the suite that every implementation and every
// decorator of backend.Backend passes. Each test of it proves one sentence of
// that interface's contract.
package backendtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// Store is one empty store.
type Store struct {
	// Open opens the store. It may be called several times, and all that it
	// returns are the same store.
	Open func(t testing.TB) backend.Backend
	// Put places a file at a path below the repository without the backend's
	// help, as others might.
	Put func(t testing.TB, path string, data []byte)
}

// Run runs the suite; fresh makes a new, empty store for each test.
func Run(t *testing.T, fresh func(t testing.TB) Store) {
	tests := []struct {
		name string
		run  func(*testing.T, Store)
	}{
		{"SaveThenLoadGivesTheSameBytes", testSaveThenLoad},
		{"AnotherInstanceSeesTheFiles", testAnotherInstance},
		{"LoadGivesExactlyTheRange", testRanges},
		{"LoadRefusesARangeBeyondTheFile", testBeyond},
		{"LoadReturnsTheErrorOfFn", testLoadFnError},
		{"LoadMayLeaveBytesUnread", testLoadUnread},
		{"MissingFileIsErrNotExist", testMissing},
		{"MissingStoreIsErrNoStore", testMissingStore},
		{"ConfigIsWrittenOnce", testConfigOnce},
		{"OfManyConfigsAtATimeOneWins", testConfigRace},
		{"SaveAgainKeepsTheFile", testSaveAgain},
		{"SaveKeepsNoReferenceToTheData", testSaveKeepsNoReference},
		{"ListNamesWhatWasSaved", testList},
		{"ListStopsAtTheErrorOfFn", testListFnError},
		{"ListLeavesOutWhatIsNoFileOfTheRepository", testListForeign},
		{"RemovedFileIsGone", testRemove},
		{"CreateAgainChangesNothing", testCreateAgain},
		{"ImpossibleNamesAreRefused", testBadNames},
		{"DoneContextChangesNothing", testDoneContext},
		{"ManyGoroutinesDoNotDisturbEachOther", testParallel},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, fresh(t)) })
	}
}

// Types lists all types but the config file's.
var Types = []backend.FileType{
	backend.KeyFile, backend.LockFile, backend.SnapshotFile, backend.IndexFile, backend.PackFile,
}

// Rand returns a source of random numbers and prints its seed.
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// Bytes returns n random bytes.
func Bytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n+7)
	for i := 0; i < n; i += 8 {
		v := r.Uint64()
		for j := range min(8, len(b)-i) {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b[:n]
}

// HandleOf is the handle of a file with these contents.
func HandleOf(t backend.FileType, data []byte) backend.Handle {
	if t == backend.ConfigFile {
		return backend.Handle{Type: t}
	}
	sum := sha256.Sum256(data)
	return backend.Handle{Type: t, Name: hex.EncodeToString(sum[:])}
}

// Load reads a range of a file into memory, however often fn is called.
func Load(ctx context.Context, be backend.Backend, h backend.Handle, length int, offset int64) ([]byte, error) {
	var data []byte
	err := be.Load(ctx, h, length, offset, func(r io.Reader) (err error) {
		data, err = io.ReadAll(r)
		return err
	})
	return data, err
}

// List collects a listing, and fails on a name that comes twice.
func List(ctx context.Context, be backend.Backend, t backend.FileType) (map[string]int64, error) {
	files := map[string]int64{}
	err := be.List(ctx, t, func(fi backend.FileInfo) error {
		if _, ok := files[fi.Name]; ok {
			return fmt.Errorf("%s is listed twice", fi.Name)
		}
		files[fi.Name] = fi.Size
		return nil
	})
	return files, err
}

// created opens the store and makes the repository in it.
func created(t testing.TB, s Store) backend.Backend {
	t.Helper()
	be := s.Open(t)
	t.Cleanup(func() {
		if err := be.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	if err := be.Create(context.Background()); err != nil {
		t.Fatalf("create: %v", err)
	}
	return be
}

// save stores data under its own hash.
func save(t testing.TB, be backend.Backend, ft backend.FileType, data []byte) backend.Handle {
	t.Helper()
	h := HandleOf(ft, data)
	if err := be.Save(context.Background(), h, data); err != nil {
		t.Fatalf("save %v: %v", h, err)
	}
	return h
}

// wantLoad checks that a whole file holds data.
func wantLoad(t testing.TB, be backend.Backend, h backend.Handle, data []byte) {
	t.Helper()
	got, err := Load(context.Background(), be, h, 0, 0)
	if err != nil {
		t.Errorf("load %v: %v", h, err)
	} else if !bytes.Equal(got, data) {
		t.Errorf("load %v: %d bytes that differ from the %d saved", h, len(got), len(data))
	}
}

func wantIs(t testing.TB, what string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: got error %q, want one that is %q", what, err, target)
	}
}

func wantNot(t testing.TB, what string, err, target error) {
	t.Helper()
	if errors.Is(err, target) {
		t.Errorf("%s: error %q is also %q", what, err, target)
	}
}
