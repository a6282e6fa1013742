// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/devmapper/dmtest"
)

// TestNoChangeUnderAFileSystemOnMappedIsMissed has files written, renamed and removed
// on a device. Frozen, an epoch is rotated, and what is then on the device is
// held against what was there at the last freeze.
func TestNoChangeUnderAFileSystemOnMappedIsMissed(t *testing.T) {
	dmtest.Need(t)
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			const size = 96 << 20
			m := newLinear(t, size/512)
			// The variables are those of the kernel's own tests, to which mkfs.xfs grants a small one.
			run(t, "env", "TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs."+fs, "-q", map[string]string{"ext4": "-F", "xfs": "-f"}[fs], m.device)
			tr := track(t, m.device)
			mount := t.TempDir()
			run(t, "mount", "-o", "discard", m.device, mount)
			t.Cleanup(func() { run(t, "umount", mount) })

			var quit atomic.Bool
			var writers sync.WaitGroup
			stop := func() {
				quit.Store(true)
				writers.Wait()
			}
			t.Cleanup(stop)
			rng := seed(t)
			for w := range 3 {
				r := rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
				writers.Go(func() {
					for !quit.Load() {
						if err := churn(filepath.Join(mount, fmt.Sprint(w)), r); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			var before []uint64
			for range guestCount(3) {
				run(t, "fsfreeze", "-f", mount)
				epoch := rotate(t, tr)
				now := hashBlocks(t, m.device, size)
				run(t, "fsfreeze", "-u", mount)
				changed := 0
				for i := range before {
					if now[i] == before[i] {
						continue
					}
					changed++
					if !epoch.Get(int64(i)) {
						t.Fatalf("block %d changed, and is not marked", i)
					}
				}
				t.Logf("%d blocks changed, %d are marked", changed, epoch.Count())
				if before != nil && changed == 0 {
					t.Error("nothing changed")
				}
				before = now
			}
			stop()
			wantReliable(t, tr)
		})
	}
}

// churn makes, changes and removes one file.
func churn(name string, r *rand.Rand) error {
	data := make([]byte, 1+r.IntN(512<<10))
	for i := 0; i < len(data); i += 64 {
		data[i] = byte(r.Uint32())
	}
	old := fmt.Sprintf("%s.%d", name, r.IntN(20))
	if err := os.WriteFile(name, data, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(data[:1+r.IntN(len(data))], r.Int64N(1<<20)); err != nil {
		return err
	}
	if r.IntN(3) == 0 {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if r.IntN(4) == 0 {
		return os.Remove(name)
	}
	return os.Rename(name, old)
}

func hashBlocks(t *testing.T, device string, size int64) (out []uint64) {
	t.Helper()
	f := openDirect(t, device)
	defer f.Close()
	buf := alignedBuffer(4 << 20)
	for offset := int64(0); offset < size; offset += int64(len(buf)) {
		if _, err := f.ReadAt(buf, offset); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(buf); i += kernel.BlockSize {
			out = append(out, maphash.Bytes(hashSeed, buf[i:i+kernel.BlockSize]))
		}
	}
	return out
}
