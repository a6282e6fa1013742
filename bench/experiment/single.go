// SPDX-License-Identifier: BSD-2-Clause

package experiment

import (
	"context"
	"crypto/sha256"
	"errors"
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

// parts are what a backup has to do with each byte, each to be measured alone.
type parts struct {
	data []byte
	all  []part
	err  error // of decompression
}

type part struct {
	name string
	run  func() // goes over the data once
}

func newParts(seed uint64) (*parts, error) {
	const blob = 1 << 20
	p := &parts{data: make([]byte, 32*blob)}
	content.New(seed, true).Fill(p.data)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false), zstd.WithWindowSize(blob), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	key, cut := crypto.NewKey(), rabin.New(chunker.Pol(0x3DA3358B4DC173))
	out, sealed := make([]byte, 0, 2*blob), make([]byte, 0, 2*blob)
	frames := make([][]byte, 0, 32)
	for i := 0; i < len(p.data); i += blob {
		frames = append(frames, enc.EncodeAll(p.data[i:i+blob], nil))
	}
	each := func(name string, fn func(b []byte, i int)) {
		p.all = append(p.all, part{name, func() {
			for i := 0; i < len(p.data); i += blob {
				fn(p.data[i:i+blob], i/blob)
			}
		}})
	}
	each("SHA-256", func(b []byte, _ int) { sha256.Sum256(b) })
	each("zstd", func(b []byte, _ int) { out = enc.EncodeAll(b, out[:0]) })
	// What is sealed is the compressed text.
	each("AES-CTR and Poly1305, of the compressed", func(_ []byte, i int) { sealed = key.Seal(sealed[:0], frames[i]) })
	each("unzstd", func(_ []byte, i int) {
		if out, err = dec.DecodeAll(frames[i], out[:0]); err != nil {
			p.err = fmt.Errorf("decompress: %w", err)
		}
	})
	each("chunking", func(b []byte, _ int) {
		for len(b) > 0 {
			n := cut.Next(b)
			if n < 0 {
				break
			}
			b = b[n:]
		}
	})
	return p, nil
}

// measure hands out a row for each part: MB of plaintext for each second of CPU time, on one
// core and blobs of 1 MiB.
func (p *parts) measure(b *Bench, experiment, what string, round int) error {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for _, part := range p.all {
		// CPU time, of which nobody else on the machine can take any.
		start, times := cpuTime(), 0
		for cpuTime()-start < 300*time.Millisecond {
			part.run()
			times++
		}
		row := result.Unknown()
		row.Experiment, row.Case, row.Tool, row.Round = experiment, what, part.name, round
		row.Rate, row.Unit = float64(times*len(p.data))/(cpuTime()-start).Seconds()/1e6, "MB/s"
		if err := b.Add(row); err != nil {
			return err
		}
		b.Log("  %-40s %8.0f MB/s", part.name, row.Rate)
	}
	return p.err
}

func runSingle(_ context.Context, b *Bench) error {
	p, err := newParts(b.nextSeed())
	if err != nil {
		return err
	}
	for round := range b.Rounds {
		if err := p.measure(b, "single", "1 MiB blobs", round); err != nil {
			return err
		}
	}
	return nil
}

// runCPU backs up a tenth of a device, scattered and in a row, and measures the parts right
// before and after each.
func runCPU(ctx context.Context, b *Bench) (err error) {
	l, err := b.newLab(ctx, b.Size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.use(ctx, "dsync-backup"); err != nil {
		return err
	}
	if err := l.round(ctx, "cpu", "first", 0, b.Size); err != nil {
		return err
	}
	p, err := newParts(b.nextSeed())
	if err != nil {
		return err
	}
	for round := range 2*b.Rounds + 1 {
		for i, what := range []string{"random 10 %", "sequential 10 %"} {
			dirty, err := l.write(0.1, i == 1)
			if err != nil {
				return err
			}
			if err := p.around(b, "cpu", what, round, func() error { return l.round(ctx, "cpu", what, round, dirty) }); err != nil {
				return err
			}
		}
	}
	return l.verify(ctx)
}

// around measures the parts before and after fn: what a core does in a second changes with what
// its neighbours do, by a factor of two within minutes.
func (p *parts) around(b *Bench, experiment, what string, round int, fn func() error) error {
	experiment += result.Parts
	if err := p.measure(b, experiment, what, round); err != nil {
		return err
	}
	if err := fn(); err != nil {
		return err
	}
	return p.measure(b, experiment, what, round)
}
