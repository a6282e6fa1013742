// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"context"
	"crypto/sha256"
	"fmt"
	"runtime"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/restic/chunker"

	"github.com/dsync-backup/dsync-backup/bench/content"
	"github.com/dsync-backup/dsync-backup/bench/result"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
	"github.com/dsync-backup/dsync-backup/snapshot/rabin"
)

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// runSingle measures on one core, on blobs of 1 MiB, what a backup has to do
// with each byte: in MB of plaintext for each second of CPU time.
func runSingle(_ context.Context, b *Bench) error {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const blob = 1 << 20
	data := make([]byte, 32*blob)
	content.New(b.nextSeed(), true).Fill(data)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false), zstd.WithWindowSize(blob), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	key, cut := crypto.NewKey(), rabin.New(chunker.Pol(0x3DA3358B4DC173))
	out, sealed := make([]byte, 0, 2*blob), make([]byte, 0, 2*blob)
	frames := make([][]byte, 0, 32)
	for i := 0; i < len(data); i += blob {
		frames = append(frames, enc.EncodeAll(data[i:i+blob], nil))
	}
	each := func(fn func(p []byte, i int)) func() {
		return func() {
			for i := 0; i < len(data); i += blob {
				fn(data[i:i+blob], i/blob)
			}
		}
	}
	parts := []struct {
		name string
		run  func()
	}{
		{"SHA-256", each(func(p []byte, _ int) { sha256.Sum256(p) })},
		{"zstd", each(func(p []byte, _ int) { out = enc.EncodeAll(p, out[:0]) })},
		// What is sealed is the compressed text.
		{"AES-CTR and Poly1305, of the compressed", each(func(_ []byte, i int) { sealed = key.Seal(sealed[:0], frames[i]) })},
		{"unzstd", each(func(_ []byte, i int) { out, err = dec.DecodeAll(frames[i], out[:0]) })},
		{"chunking", each(func(p []byte, _ int) {
			for len(p) > 0 {
				n := cut.Next(p)
				if n < 0 {
					break
				}
				p = p[n:]
			}
		})},
	}
	for round := range b.Rounds {
		for _, p := range parts {
			// CPU time, of which nobody else on the machine can take any.
			start, times := cpuTime(), 0
			for cpuTime()-start < 300*time.Millisecond {
				p.run()
				times++
			}
			row := result.Unknown()
			row.Experiment, row.Case, row.Tool, row.Round = "single", "1 MiB blobs", p.name, round
			row.Rate, row.Unit = float64(times*len(data))/(cpuTime()-start).Seconds()/1e6, "MB/s"
			if err := b.Add(row); err != nil {
				return err
			}
			b.Log("  %-40s %8.0f MB/s", p.name, row.Rate)
		}
	}
	if err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	return nil
}
