// SPDX-License-Identifier: BSD-2-Clause

package backendtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

func testSaveThenLoad(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	for _, size := range []int{0, 1, 4095, 4096, 100_000, 5<<20 + 1} {
		for _, ft := range Types {
			data := Bytes(r, size)
			h := save(t, be, ft, data)
			wantLoad(t, be, h, data)
			fi, err := be.Stat(context.Background(), h)
			if err != nil || fi != (backend.FileInfo{Name: h.Name, Size: int64(size)}) {
				t.Errorf("stat %v: %+v, %v", h, fi, err)
			}
		}
	}
	config := Bytes(r, 155)
	h := save(t, be, backend.ConfigFile, config)
	wantLoad(t, be, h, config)
	fi, err := be.Stat(context.Background(), h)
	if err != nil || fi != (backend.FileInfo{Size: 155}) {
		t.Errorf("stat %v: %+v, %v", h, fi, err)
	}
}

func testAnotherInstance(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	data := Bytes(r, 5000)
	h := save(t, be, backend.PackFile, data)
	other := s.Open(t)
	defer other.Close()
	wantLoad(t, other, h, data)
	if be.Location() != other.Location() || be.Location() == "" {
		t.Errorf("locations are %q and %q", be.Location(), other.Location())
	}
	if be.Connections() < 1 {
		t.Errorf("Connections is %d", be.Connections())
	}
}

func testRanges(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	data := Bytes(r, 300_000)
	h := save(t, be, backend.PackFile, data)
	ranges := [][2]int{{1, 0}, {1, 1}, {1, len(data) - 1}, {len(data), 0}, {0, 0}, {0, 1}, {0, len(data) - 1}, {0, len(data)}}
	for range 30 {
		off := r.IntN(len(data))
		ranges = append(ranges, [2]int{1 + r.IntN(len(data)-off), off})
	}
	for _, lo := range ranges {
		length, off := lo[0], lo[1]
		want := data[off:]
		if length > 0 {
			want = want[:length]
		}
		got, err := Load(context.Background(), be, h, length, int64(off))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("load %d bytes at %d: got %d bytes, error %v", length, off, len(got), err)
		}
	}
}

func testBeyond(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	data := Bytes(r, 1000)
	full, empty := save(t, be, backend.PackFile, data), save(t, be, backend.PackFile, nil)
	for _, c := range []struct {
		h      backend.Handle
		length int
		offset int64
	}{
		{full, 1001, 0},
		{full, 1, 1000},
		{full, 2, 999},
		{full, 1, 5000},
		{full, 0, 1001},
		{full, 500, 501},
		{full, 1, -1},
		{full, -1, 0},
		{full, 10, 1<<62 - 5},
		{empty, 1, 0},
		{empty, 0, 1},
	} {
		called := false
		err := be.Load(context.Background(), c.h, c.length, c.offset, func(io.Reader) error {
			called = true
			return nil
		})
		wantIs(t, "load beyond the end", err, backend.ErrRange)
		wantIs(t, "load beyond the end", err, backend.ErrPermanent)
		wantNot(t, "load beyond the end", err, backend.ErrNotExist)
		if called {
			t.Errorf("load of %d bytes at %d called fn", c.length, c.offset)
		}
	}
}

func testLoadFnError(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	h := save(t, be, backend.IndexFile, Bytes(r, 9000))
	mine, calls := errors.New("mine"), 0
	err := be.Load(context.Background(), h, 0, 0, func(rd io.Reader) error {
		calls++
		if _, err := io.CopyN(io.Discard, rd, 10); err != nil {
			return err
		}
		return mine
	})
	wantIs(t, "load", err, mine)
	wantNot(t, "load", err, backend.ErrPermanent)
	if calls != 1 {
		t.Errorf("fn was called %d times", calls)
	}
}

func testLoadUnread(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	data := Bytes(r, 3<<20)
	h := save(t, be, backend.PackFile, data)
	for range 5 {
		head := make([]byte, 100)
		err := be.Load(context.Background(), h, 0, 50, func(rd io.Reader) error {
			_, err := io.ReadFull(rd, head)
			return err
		})
		if err != nil || !bytes.Equal(head, data[50:150]) {
			t.Errorf("load of the head: %v", err)
		}
	}
	wantLoad(t, be, h, data)
}

func testSaveAgain(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	for _, ft := range Types {
		data := Bytes(r, 2000)
		h := save(t, be, ft, data)
		save(t, be, ft, data)
		wantLoad(t, be, h, data)
	}
}

func testSaveKeepsNoReference(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	data := Bytes(r, 200_000)
	want := slices.Clone(data)
	h := save(t, be, backend.PackFile, data)
	if !bytes.Equal(data, want) {
		t.Error("save changed the data")
	}
	clear(data)
	wantLoad(t, be, h, want)
}

func testRemove(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	ctx := context.Background()
	for _, ft := range Types {
		gone, stays := Bytes(r, 700), Bytes(r, 700)
		h, other := save(t, be, ft, gone), save(t, be, ft, stays)
		if err := be.Remove(ctx, h); err != nil {
			t.Fatalf("remove %v: %v", h, err)
		}
		_, err := be.Stat(ctx, h)
		wantIs(t, "stat of a removed file", err, backend.ErrNotExist)
		wantIs(t, "second removal", be.Remove(ctx, h), backend.ErrNotExist)
		wantLoad(t, be, other, stays)
		save(t, be, ft, gone)
		wantLoad(t, be, h, gone)
	}
}
