// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

const readArg = "read-image"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == readArg {
		os.Exit(readImage(os.Args[2]))
	}
	os.Exit(looptest.Main(m))
}

// random fills a file or device with bytes and returns them, and says the seed.
func random(t *testing.T, path string, size int64) ([]byte, *rand.Rand) {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	data := make([]byte, size)
	var key [32]byte
	copy(key[:], fmt.Sprint(seed))
	src := rand.NewChaCha8(key)
	src.Read(data)
	put(t, path, data, 0)
	return data, rand.New(src)
}

func put(t *testing.T, path string, data []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path string, o Options) *Device {
	t.Helper()
	d, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestReadExtentReturnsWhatWasWritten(t *testing.T) {
	const odd = 3<<20 + 4096*3 + 1001
	tmpfs := filepath.Join("/dev/shm", fmt.Sprintf("device-test-%d", os.Getpid()))
	t.Cleanup(func() { os.Remove(tmpfs) })
	cases := map[string]struct {
		path string
		size int64
	}{
		"FileOdd":          {filepath.Join(t.TempDir(), "odd"), odd},
		"FileShort":        {filepath.Join(t.TempDir(), "short"), 7},
		"FileTmpfs":        {tmpfs, odd},
		"LoopWholeBlocks":  {looptest.Device(t, 4<<20), 4 << 20},
		"LoopHalfBlock":    {looptest.Device(t, 4<<20+512*3), 4<<20 + 512*3},
		"Loop4KiBSectors":  {looptest.Device(t, 4<<20, "--sector-size", "4096"), 4 << 20},
		"LoopNotOfSectors": {looptest.Device(t, odd), odd / 512 * 512},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			want, rng := random(t, c.path, c.size)
			d := open(t, c.path, Options{})
			if d.Size() != c.size {
				t.Fatalf("size %d, want %d", d.Size(), c.size)
			}
			for range 200 {
				off := rng.Int64N(c.size)
				n := 1 + rng.Int64N(min(c.size-off, 300<<10))
				buf := AlignedBuffer(int(n))
				switch rng.IntN(4) {
				case 0:
					buf = make([]byte, n+1)[1:] // wherever Go puts it
				case 1, 2:
					off = off / 4096 * 4096
					buf = AlignedBuffer(int(min(n, c.size-off)))
				}
				if err := d.ReadExtent(t.Context(), buf, off); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(buf, want[off:off+int64(len(buf))]) {
					t.Fatalf("%d bytes at %d differ", len(buf), off)
				}
			}
			whole := AlignedBuffer(int(c.size))
			if err := d.ReadExtent(t.Context(), whole, 0); err != nil || !bytes.Equal(whole, want) {
				t.Fatalf("whole device: %v", err)
			}
			if d.ReadExtent(t.Context(), whole[:1], c.size) == nil {
				t.Fatal("read beyond the end")
			}
		})
	}
}

func TestReadsSeeWhatAMountedFileSystemWrote(t *testing.T) {
	dev := looptest.Device(t, 64<<20)
	looptest.Mkfs(t, "ext4", dev)
	dir := looptest.Mount(t, dev)
	old, _ := random(t, dir+"/f", 8<<20)
	unix.Sync()
	cached := make([]byte, 64<<20)
	page, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer page.Close()
	if _, err := io.ReadFull(page, cached); err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(cached, old[:4096])
	fresh, _ := random(t, dir+"/f", 8<<20)
	unix.Sync()
	if at < 0 {
		t.Fatal("the file is not on the device")
	}
	d := open(t, dev, Options{})
	got := AlignedBuffer(4096)
	if err := d.ReadExtent(t.Context(), got, int64(at)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, fresh[:4096]) {
		t.Fatal("a direct read returned stale data")
	}
	if _, err := page.ReadAt(cached[:4096], int64(at)); err != nil || !bytes.Equal(cached[:4096], old[:4096]) {
		t.Logf("the page cache was not stale this time (%v): the read above proves less", err)
	}
}

func TestReadErrorsNameTheBytes(t *testing.T) {
	image := looptest.File(t, 8<<20)
	dev := looptest.Attach(t, image)
	d := open(t, dev, Options{})
	if err := os.Truncate(image, 5<<20); err != nil {
		t.Fatal(err)
	}
	err := d.ReadExtent(t.Context(), AlignedBuffer(4<<20), 3<<20)
	var re *ReadError
	if !errors.As(err, &re) || !errors.Is(err, unix.EIO) {
		t.Fatalf("got %v, want an I/O error", err)
	}
	if want := (kernel.Extent{Offset: 5 << 20, Length: 4096}); re.Extent != want || re.Path != dev {
		t.Fatalf("error names %v of %s, want %v", re.Extent, re.Path, want)
	}
}

func TestShrunkDeviceIsAnError(t *testing.T) {
	check := func(t *testing.T, path, image string, args ...string) {
		d := open(t, path, Options{})
		if err := os.Truncate(image, 3<<20+1000); err != nil {
			t.Fatal(err)
		}
		if len(args) > 0 {
			looptest.Run(t, args[0], args[1:]...)
		}
		if err := d.ReadExtent(t.Context(), AlignedBuffer(4<<20), 2<<20); !errors.Is(err, ErrShrunk) {
			t.Fatalf("got %v, want ErrShrunk", err)
		}
	}
	t.Run("File", func(t *testing.T) {
		image := looptest.File(t, 8<<20)
		check(t, image, image)
	})
	t.Run("Loop", func(t *testing.T) {
		image := looptest.File(t, 8<<20)
		dev := looptest.Attach(t, image)
		check(t, dev, image, "losetup", "-c", dev)
	})
}

func TestReadStopsWithItsContext(t *testing.T) {
	d := open(t, looptest.File(t, 1<<20), Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.ReadExtent(ctx, AlignedBuffer(4096), 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}

func TestOpenRefusesWhatIsNoDevice(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/dev/null"} {
		if _, err := Open(path, Options{}); !errors.Is(err, ErrNotDevice) {
			t.Errorf("%s: got %v", path, err)
		}
	}
	if _, err := Open(t.TempDir()+"/none", Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: got %v", err)
	}
}

// readImage is run without privileges: it copies an image to standard output.
func readImage(path string) int {
	d, err := Open(path, Options{})
	if err == nil {
		_, err = InUse(path)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	out := AlignedBuffer(int(d.Size()))
	extents, err := d.DataExtents(context.Background())
	for _, e := range extents {
		err = errors.Join(err, d.ReadExtent(context.Background(), out[e.Offset:e.End()], e.Offset))
	}
	fmt.Fprintln(os.Stderr, os.Geteuid(), kernel.TotalLength(extents))
	if _, werr := os.Stdout.Write(out); err != nil || werr != nil {
		fmt.Fprintln(os.Stderr, err, werr)
		return 1
	}
	return 0
}

func TestImageFileIsReadWithoutRoot(t *testing.T) {
	dir, err := os.MkdirTemp("", "device-nobody-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "image")
	want := make([]byte, 64<<20+777)
	data := []byte("some data at a place that is not aligned")
	copy(want[40<<20+100:], data)
	put(t, image, data, 40<<20+100)
	if err := os.Truncate(image, int64(len(want))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", readArg, image)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var stderr bytes.Buffer
	cmd.Stderr, cmd.Dir = &stderr, "/"
	got, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the image differs")
	}
	if stderr.String() != "65534 4096\n" {
		t.Fatalf("as user, bytes read: %s, want 65534 4096", stderr.String())
	}
}
