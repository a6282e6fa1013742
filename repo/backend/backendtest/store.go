// SPDX-License-Identifier: BSD-2-Clause

package backendtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"strings"
	"sync"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// calls are all calls that concern one file or type, each as a function of the
// store and the file alone.
var calls = map[string]func(context.Context, backend.Backend, backend.Handle) error{
	"load": func(ctx context.Context, be backend.Backend, h backend.Handle) error {
		return be.Load(ctx, h, 0, 0, func(io.Reader) error { return nil })
	},
	"load of a range": func(ctx context.Context, be backend.Backend, h backend.Handle) error {
		return be.Load(ctx, h, 5, 5, func(io.Reader) error { return nil })
	},
	"stat": func(ctx context.Context, be backend.Backend, h backend.Handle) error {
		_, err := be.Stat(ctx, h)
		return err
	},
	"remove": func(ctx context.Context, be backend.Backend, h backend.Handle) error { return be.Remove(ctx, h) },
	"save": func(ctx context.Context, be backend.Backend, h backend.Handle) error {
		return be.Save(ctx, h, []byte("x"))
	},
	"list": func(ctx context.Context, be backend.Backend, h backend.Handle) error {
		return be.List(ctx, h.Type, func(backend.FileInfo) error { return nil })
	},
}

// everyHandle is a file of each type, the config file among them.
func everyHandle() []backend.Handle {
	hs := []backend.Handle{{Type: backend.ConfigFile}}
	for _, ft := range Types {
		hs = append(hs, HandleOf(ft, []byte("no such file")))
	}
	return hs
}

func testMissing(t *testing.T, s Store) {
	be := created(t, s)
	for _, h := range everyHandle() {
		for _, name := range []string{"load", "load of a range", "stat", "remove"} {
			err := calls[name](context.Background(), be, h)
			wantIs(t, name, err, backend.ErrNotExist)
			wantNot(t, name, err, backend.ErrNoStore)
			if err != nil && (strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), h.String())) {
				t.Errorf("%s: error %q is not one line that names %v", name, err, h)
			}
		}
		files, err := List(context.Background(), be, h.Type)
		if err != nil || len(files) != 0 {
			t.Errorf("list %v of an empty store: %v, %v", h.Type, files, err)
		}
	}
}

func testMissingStore(t *testing.T, s Store) {
	be := s.Open(t)
	defer be.Close()
	for _, h := range everyHandle() {
		for name, call := range calls {
			err := call(context.Background(), be, h)
			what := name + " of " + h.String()
			wantIs(t, what, err, backend.ErrNoStore)
			wantIs(t, what, err, backend.ErrPermanent)
			if h.Type == backend.ConfigFile {
				wantIs(t, what, err, backend.ErrNotExist)
			} else {
				wantNot(t, what, err, backend.ErrNotExist)
			}
		}
	}
}

func testConfigOnce(t *testing.T, s Store) {
	be := created(t, s)
	first := []byte("the first configuration")
	h := save(t, be, backend.ConfigFile, first)
	err := be.Save(context.Background(), h, []byte("another one"))
	wantIs(t, "second save", err, backend.ErrExist)
	wantLoad(t, be, h, first)
	files, err := List(context.Background(), be, backend.ConfigFile)
	if err != nil || !maps.Equal(files, map[string]int64{"": int64(len(first))}) {
		t.Errorf("list of the config file: %v, %v", files, err)
	}
}

func testConfigRace(t *testing.T, s Store) {
	be := created(t, s)
	const writers = 8
	errs := make([]error, writers)
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			data := bytes.Repeat([]byte{byte(i)}, 1000+i)
			errs[i] = be.Save(context.Background(), backend.Handle{Type: backend.ConfigFile}, data)
		})
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		switch {
		case err == nil && winner >= 0:
			t.Errorf("writers %d and %d both won", winner, i)
		case err == nil:
			winner = i
		default:
			wantIs(t, "save", err, backend.ErrExist)
		}
	}
	if winner < 0 {
		t.Fatal("nobody won")
	}
	wantLoad(t, be, backend.Handle{Type: backend.ConfigFile}, bytes.Repeat([]byte{byte(winner)}, 1000+winner))
}

func testList(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	want := map[backend.FileType]map[string]int64{}
	for i, ft := range Types {
		want[ft] = map[string]int64{}
		for range 4 + i {
			data := Bytes(r, r.IntN(3000))
			want[ft][save(t, be, ft, data).Name] = int64(len(data))
		}
	}
	save(t, be, backend.ConfigFile, []byte("x"))
	for _, ft := range Types {
		got, err := List(context.Background(), be, ft)
		if err != nil || !maps.Equal(got, want[ft]) {
			t.Errorf("list %v: error %v, got %v, want %v", ft, err, got, want[ft])
		}
	}
}

func testListFnError(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	for range 5 {
		save(t, be, backend.PackFile, Bytes(r, 10))
	}
	mine, n := errors.New("mine"), 0
	err := be.List(context.Background(), backend.PackFile, func(backend.FileInfo) error {
		n++
		if n == 2 {
			return mine
		}
		return nil
	})
	wantIs(t, "list", err, mine)
	if n != 2 {
		t.Errorf("fn was called %d times, want 2", n)
	}
}

func testListForeign(t *testing.T, s Store) {
	be := created(t, s)
	name := strings.Repeat("0123456789abcdef", 4)
	for _, p := range []string{
		"README", "config-tmp-1", "data/README", "data/01/" + name + "-tmp-77", "data/" + name, "data/02/" + name,
		"data/01/" + strings.ToUpper(name), "data/01/deeper/" + name, "index/" + name + ".bak", "index/deeper/" + name,
		"snapshots/" + name[:63], "locks/.hidden", "keys/" + name + "0",
	} {
		s.Put(t, p, []byte("foreign"))
	}
	for _, ft := range append([]backend.FileType{backend.ConfigFile}, Types...) {
		files, err := List(context.Background(), be, ft)
		if err != nil || len(files) != 0 {
			t.Errorf("list %v: %v, %v", ft, files, err)
		}
	}
	s.Put(t, "data/01/"+name, []byte("a pack"))
	files, err := List(context.Background(), be, backend.PackFile)
	if err != nil || !maps.Equal(files, map[string]int64{name: 6}) {
		t.Errorf("list of the one pack: %v, %v", files, err)
	}
}

func testCreateAgain(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	data := Bytes(r, 100)
	h := save(t, be, backend.SnapshotFile, data)
	config := save(t, be, backend.ConfigFile, data)
	if err := be.Create(context.Background()); err != nil {
		t.Errorf("second create: %v", err)
	}
	wantLoad(t, be, h, data)
	wantLoad(t, be, config, data)
}

func testBadNames(t *testing.T, s Store) {
	be := created(t, s)
	good := strings.Repeat("ab", 32)
	for _, h := range []backend.Handle{
		{},
		{Type: 99, Name: good},
		{Type: backend.ConfigFile, Name: good},
		{Type: backend.PackFile},
		{Type: backend.PackFile, Name: "../" + good[3:]},
		{Type: backend.KeyFile, Name: good + "0"},
		{Type: backend.LockFile, Name: strings.ToUpper(good)},
		{Type: backend.IndexFile, Name: good[:63] + "/"},
	} {
		for name, call := range calls {
			if name != "list" {
				wantIs(t, name, call(context.Background(), be, h), backend.ErrPermanent)
			}
		}
	}
}

func testDoneContext(t *testing.T, s Store) {
	be, r := created(t, s), Rand(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	data := Bytes(r, 100)
	for _, ft := range Types {
		kept := save(t, be, ft, data)
		for name, call := range calls {
			if name != "save" {
				wantIs(t, name, call(ctx, be, kept), context.Canceled)
			}
		}
		other := HandleOf(ft, []byte("never saved"))
		wantIs(t, "save", be.Save(ctx, other, data), context.Canceled)
		wantLoad(t, be, kept, data)
		files, err := List(context.Background(), be, ft)
		if err != nil || !maps.Equal(files, map[string]int64{kept.Name: 100}) {
			t.Errorf("list %v afterwards: %v, %v", ft, files, err)
		}
	}
	wantIs(t, "create", be.Create(ctx), context.Canceled)
}

func testParallel(t *testing.T, s Store) {
	be := created(t, s)
	var wg sync.WaitGroup
	for range 8 {
		r := Rand(t)
		wg.Go(func() {
			ctx := context.Background()
			for i := range 12 {
				data := Bytes(r, 1+r.IntN(40_000))
				h := HandleOf(Types[i%len(Types)], data)
				if err := be.Save(ctx, h, data); err != nil {
					t.Errorf("save %v: %v", h, err)
					return
				}
				wantLoad(t, be, h, data)
				files, err := List(ctx, be, h.Type)
				if err != nil || files[h.Name] != int64(len(data)) {
					t.Errorf("list lacks %v: %v", h, err)
				}
				if i%2 == 0 {
					if err := be.Remove(ctx, h); err != nil {
						t.Errorf("remove %v: %v", h, err)
					}
				}
			}
		})
	}
	wg.Wait()
}
