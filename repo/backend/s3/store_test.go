// SPDX-License-Identifier: BSD-2-Clause

package s3_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
	"golang.org/x/sync/errgroup"
)

// TestAListingOfManyPagesIsComplete lists 2,100 [1,100] files; a page has
// 1,000.
func TestAListingOfManyPagesIsComplete(t *testing.T) {
	files := 1100
	if os.Getenv("SOAK") == "1" {
		files = 2100
	}
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	be := open(t, server.Location("bucket", "p"), s3.Options{Connections: 16})
	want := map[string]int64{}
	var g errgroup.Group
	g.SetLimit(be.Connections())
	for i := range files {
		data := binary.LittleEndian.AppendUint32(nil, uint32(i))
		h := backendtest.HandleOf(backend.PackFile, data)
		want[h.Name] = 4
		g.Go(func() error { return be.Save(context.Background(), h, data) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, v1 := range []bool{false, true} {
		lister := open(t, server.Location("bucket", "p"), s3.Options{ListV1: v1})
		got, err := backendtest.List(context.Background(), lister, backend.PackFile)
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("listed %d files of %d, error %v", len(got), len(want), err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := 0
	err := be.List(ctx, backend.PackFile, func(backend.FileInfo) error {
		if n++; n == 1000 { // the page's last: the client would end without a word
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a listing that was cancelled after %d names: %v", n, err)
	}
}

func TestABucketThatGoesAwayIsNoMissingFile(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	be := retry.New(open(t, server.Location("bucket", ""), s3.Options{}), retry.Options{})
	ctx := context.Background()
	if err := be.Save(ctx, someFile, []byte("x")); err != nil {
		t.Fatal(err)
	}
	server.RemoveBucket("bucket")
	errs := everyCall(be)
	for _, call := range []string{"load", "stat", "list", "remove", "save"} {
		if err := errs[call]; !errors.Is(err, backend.ErrNoStore) || errors.Is(err, backend.ErrNotExist) {
			t.Errorf("%s: %v", call, err)
		}
	}
}

// TestASaveOutlivesARestartOfTheServer stops the server while files are saved
// and starts it again: nobody notices, and nothing is lost.
func TestASaveOutlivesARestartOfTheServer(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	be := retry.New(open(t, server.Location("bucket", ""), s3.Options{}), retry.Options{})
	r := backendtest.Rand(t)
	ctx := context.Background()
	saved := map[backend.Handle][]byte{}
	var wg sync.WaitGroup
	for i := range 24 {
		data := backendtest.Bytes(r, 1<<20)
		h := backendtest.HandleOf(backend.PackFile, data)
		saved[h] = data
		wg.Go(func() {
			if err := be.Save(ctx, h, data); err != nil {
				t.Errorf("save: %v", err)
			}
		})
		switch i {
		case 8:
			server.Stop()
		case 16:
			server.Restart()
		}
	}
	wg.Wait()
	for h, data := range saved {
		got, err := backendtest.Load(ctx, be, h, 0, 0)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("load %v: %d bytes, error %v", h, len(got), err)
		}
	}
}

// TestTheDataIsTheCallersAgainWhenSaveFails saves through connections that
// break and to a server that answers before it has read the body, and changes
// the data as soon as Save has returned; the race detector watches.
func TestTheDataIsTheCallersAgainWhenSaveFails(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	front := cutter(t, server.Host, 300)
	for name, location := range map[string]string{
		"broken": "s3:http://" + front + "/bucket", "early answer": server.Location("no-such-bucket", ""),
	} {
		be := open(t, location, s3.Options{Region: "us-east-1"})
		data := make([]byte, 8<<20)
		for range 10 {
			h := backendtest.HandleOf(backend.PackFile, data)
			if err := be.Save(context.Background(), h, data); name == "early answer" && err == nil {
				t.Errorf("%s: save worked", name)
			}
			for i := range data {
				data[i]++
			}
		}
	}
}

// TestAConnectionThatBreaksOffIsNoEndOfFile cuts the connection in the middle
// of a download.
func TestAConnectionThatBreaksOffIsNoEndOfFile(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	server.MakeBucket("bucket")
	r := backendtest.Rand(t)
	data := backendtest.Bytes(r, 8<<20)
	h := backendtest.HandleOf(backend.PackFile, data)
	direct := open(t, server.Location("bucket", ""), s3.Options{})
	if err := direct.Save(context.Background(), h, data); err != nil {
		t.Fatal(err)
	}
	front := cutter(t, server.Host, 3<<20)
	for _, length := range []int{0, 7 << 20} {
		be := open(t, "s3:http://"+front+"/bucket", s3.Options{})
		var fnErr error
		err := be.Load(context.Background(), h, length, 0, func(rd io.Reader) error {
			_, fnErr = io.Copy(io.Discard, rd)
			return fnErr
		})
		if fnErr == nil || err == nil || errors.Is(err, backend.ErrPermanent) || errors.Is(err, backend.ErrNotExist) {
			t.Errorf("load through a cut connection: fn read with error %v, load returned %v", fnErr, err)
		}
	}
}

// cutter forwards TCP connections to host and closes each once so many bytes
// have come back on it.
func cutter(t *testing.T, host string, bytes int64) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", host)
			if err != nil {
				in.Close()
				continue
			}
			go func() {
				_, _ = io.Copy(out, in)
				out.Close()
			}()
			go func() {
				_, _ = io.CopyN(in, out, bytes)
				in.Close()
			}()
		}
	}()
	return l.Addr().String()
}

func TestAFullStoreIsPermanentAndClear(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatalf("mount a small tmpfs (needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	server := miniotest.Start(t, miniotest.WithData(filepath.Join(dir, "data")))
	server.Setenv(t)
	server.MakeBucket("bucket")
	be := open(t, server.Location("bucket", ""), s3.Options{})
	r := backendtest.Rand(t)
	for range 20 {
		data := backendtest.Bytes(r, 8<<20)
		if err := be.Save(context.Background(), backendtest.HandleOf(backend.PackFile, data), data); err != nil {
			wantPermanent(t, map[string]error{"save": err}, "the store is full")
			return
		}
	}
	t.Error("160 MiB fit into 64")
}
