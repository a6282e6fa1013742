// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/snapshot/device/looptest"
)

// someReads are up to n reads, most of them of one block.
func someReads(r *rand.Rand, size int64, n int) (reads []Read) {
	for range 1 + r.IntN(n) {
		off := r.Int64N(size)
		length := 1 + r.Int64N(min(size-off, 300<<10))
		switch r.IntN(20) {
		case 0:
			reads = append(reads, Read{off, make([]byte, length+1)[1:]})
			continue
		case 1:
			reads = append(reads, Read{off, nil})
			continue
		case 2, 3:
		default:
			length = min(length, 4096)
		}
		off = off / 4096 * 4096
		reads = append(reads, Read{off, AlignedBuffer(int(min((length+4095)/4096*4096, size-off)))})
	}
	return reads
}

func TestReadExtentsReturnWhatWasWritten(t *testing.T) {
	const odd = 3<<20 + 4096*3 + 1001
	for name, c := range map[string]struct {
		path string
		size int64
	}{
		"File":          {filepath.Join(t.TempDir(), "odd"), odd},
		"Loop":          {looptest.Device(t, 4<<20), 4 << 20},
		"LoopHalfBlock": {looptest.Device(t, 4<<20+512*3), 4<<20 + 512*3},
	} {
		want, rng := random(t, c.path, c.size)
		d := open(t, c.path, Options{})
		check := func(t *testing.T) {
			var wg sync.WaitGroup
			for range 8 {
				r := rand.New(rand.NewPCG(rng.Uint64(), 0))
				wg.Go(func() {
					for range 40 {
						reads := someReads(r, c.size, 3*queueDepth)
						if err := d.ReadExtents(t.Context(), reads, 1+r.IntN(2*queueDepth)); err != nil {
							t.Error(err)
						}
						for _, p := range reads {
							if !bytes.Equal(p.Into, want[p.Offset:p.Offset+int64(len(p.Into))]) {
								t.Errorf("%d bytes at %d differ", len(p.Into), p.Offset)
							}
						}
					}
				})
			}
			wg.Wait()
		}
		t.Run(name, check)
		t.Run(name+"WithoutQueues", func(t *testing.T) {
			withoutQueues(t)
			check(t)
		})
	}
	if len(queues.free) == 0 {
		t.Error("no queue was ever used")
	}
}

// withoutQueues is a kernel that gives none.
func withoutQueues(t *testing.T) {
	t.Helper()
	free := queues.free
	queues.free, queues.failed = nil, true
	t.Cleanup(func() { queues.free, queues.failed = free, false })
}

func TestErrorsOfReadExtentsNameTheBytes(t *testing.T) {
	image := looptest.File(t, 8<<20)
	dev := looptest.Attach(t, image)
	d := open(t, dev, Options{})
	if err := os.Truncate(image, 5<<20); err != nil {
		t.Fatal(err)
	}
	var reads []Read
	for off := int64(0); off < 8<<20; off += 64 << 10 {
		reads = append(reads, Read{off, AlignedBuffer(8192)})
	}
	var re *ReadError
	if err := d.ReadExtents(t.Context(), reads, 16); !errors.As(err, &re) || !errors.Is(err, unix.EIO) {
		t.Fatalf("got %v, want an I/O error", err)
	}
	if e := re.Extent; e.Offset < 5<<20 || e.Offset%(64<<10) != 0 || e.Length != 4096 || re.Path != dev {
		t.Errorf("error names %v of %s, which is none of the reads that failed", e, re.Path)
	}
	// What can be read was.
	if err := d.ReadExtents(t.Context(), reads[:80], 16); err != nil {
		t.Errorf("reads after an error: %v", err)
	}
	looptest.Run(t, "losetup", "-c", dev)
	if err := d.ReadExtents(t.Context(), reads, 16); !errors.Is(err, ErrShrunk) {
		t.Errorf("got %v, want ErrShrunk", err)
	}
	if err := d.ReadExtents(t.Context(), append(reads[:3:3], Read{8 << 20, AlignedBuffer(4096)}), 16); !errors.As(err, &re) || re.Extent.Offset != 8<<20 {
		t.Errorf("beyond the end: %v", err)
	}
}

func TestReadExtentsStopWithTheirContext(t *testing.T) {
	d := open(t, looptest.File(t, 1<<20), Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	reads := []Read{{0, AlignedBuffer(4096)}, {8192, AlignedBuffer(4096)}}
	if err := d.ReadExtents(ctx, reads, 16); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}
