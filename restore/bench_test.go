// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"io"
	"path/filepath"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// BenchmarkRestore restores 256 MiB of chunked data, and the same with 20,000
// scattered blocks of newer layers in it.
func BenchmarkRestore(b *testing.B) {
	f := newFixture(b, 1, 256<<20)
	f.fill(f.image)
	f.backup(1, kernel.Extent{Length: 256 << 20})
	for range 5 {
		var dirty []kernel.Extent
		for range 4000 {
			e := kernel.Extent{Offset: f.rnd.Int64N(256<<8) * kernel.BlockSize, Length: kernel.BlockSize}
			f.fill(f.image[e.Offset : e.Offset+64])
			dirty = append(dirty, e)
		}
		f.backup(1, dirty...)
	}
	for name, s := range map[string]snap{"Full": f.snaps[0], "SixLayers": f.snaps[5]} {
		b.Run(name+"/File", func(b *testing.B) {
			b.SetBytes(256 << 20)
			b.ReportAllocs()
			dir := b.TempDir()
			for b.Loop() {
				f.restore(Options{Device: s.device, Target: filepath.Join(dir, "image"), Changes: ChangesAll, Force: true})
			}
		})
		b.Run(name+"/Dump", func(b *testing.B) {
			b.SetBytes(256 << 20)
			for b.Loop() {
				_, err := Dump(b.Context(), f.store, io.Discard, DumpOptions{Device: s.device})
				f.must(err)
			}
		})
	}
}
