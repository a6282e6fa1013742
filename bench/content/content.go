// SPDX-License-Identifier: BSD-2-Clause

// Package content makes the data that the benchmark works on, and writes it to
// devices past the page cache.
package content

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BlockSize is the unit of updates, in bytes.
const BlockSize = 4096

// Of each unit of a block, so many bytes are a word out of a small dictionary
// and the rest is random: 1 MiB compresses about 2:1, 4 KiB to 1.4:1.
const (
	unitSize = 64
	wordSize = 36
	words    = 24
)

// Maker makes content. It is for one goroutine.
type Maker struct {
	r     *rand.Rand
	words []byte // nil: nothing compresses it
}

// New makes a maker of the same content for the same seed, which compresses
// 2:1 or not at all.
func New(seed uint64, compressible bool) *Maker {
	m := &Maker{r: rand.New(rand.NewPCG(seed, 0x6473796e63))}
	if compressible {
		// The words do not depend on the seed: all content shares them.
		w := &Maker{r: rand.New(rand.NewPCG(1, 2))}
		m.words = make([]byte, words*wordSize)
		w.random(m.words)
	}
	return m
}

func (m *Maker) random(b []byte) {
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, m.r.Uint64())
	}
	for i := range b {
		b[i] = byte(m.r.Uint32())
	}
}

// Fill fills b, a multiple of 64 bytes.
func (m *Maker) Fill(b []byte) {
	m.random(b)
	if m.words == nil {
		return
	}
	for i := 0; i < len(b); i += unitSize {
		w := m.r.IntN(words) * wordSize
		copy(b[i:], m.words[w:w+wordSize])
	}
}

// Random picks n different blocks out of all, sorted.
func (m *Maker) Random(all, n int64) []int64 {
	if n >= all {
		return sequence(0, all)
	}
	if n > all/8 { // too many to draw one by one without meeting known ones
		p := make([]int64, all)
		for i := range p {
			p[i] = int64(i)
		}
		for i := range n {
			j := i + m.r.Int64N(all-i)
			p[i], p[j] = p[j], p[i]
		}
		p = p[:n]
		slices.Sort(p)
		return p
	}
	picked := make(map[int64]bool, n)
	for int64(len(picked)) < n {
		picked[m.r.Int64N(all)] = true
	}
	out := make([]int64, 0, n)
	for b := range picked {
		out = append(out, b)
	}
	slices.Sort(out)
	return out
}

// Sequential picks n blocks in a row, at a random place.
func (m *Maker) Sequential(all, n int64) []int64 {
	n = min(n, all)
	return sequence(m.r.Int64N(all-n+1), n)
}

func sequence(from, n int64) []int64 {
	out := make([]int64, n)
	for i := range out {
		out[i] = from + int64(i)
	}
	return out
}

// Buffer is memory for direct I/O.
func Buffer(n int) []byte {
	b := make([]byte, n+BlockSize)
	skip := (BlockSize - int(uintptr(unsafe.Pointer(&b[0]))%BlockSize)) % BlockSize
	return b[skip : skip+n : skip+n]
}

// Write writes new content to blocks of a device, sorted, and makes it durable.
// Neighbours are written together.
func Write(path string, m *Maker, blocks []int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	type write struct {
		buf []byte
		off int64
	}
	const writers = 16
	jobs, free, errs := make(chan write), make(chan []byte, 2*writers), make(chan error, writers)
	for range 2 * writers {
		free <- Buffer(1 << 20)
	}
	for range writers {
		go func() {
			var first error
			for j := range jobs {
				if _, err := f.WriteAt(j.buf, j.off); err != nil && first == nil {
					first = err
				}
				free <- j.buf[:1<<20]
			}
			errs <- first
		}()
	}
	for len(blocks) > 0 {
		n := 1
		for n < len(blocks) && n < (1<<20)/BlockSize && blocks[n] == blocks[0]+int64(n) {
			n++
		}
		buf := (<-free)[:n*BlockSize]
		m.Fill(buf)
		jobs <- write{buf, blocks[0] * BlockSize}
		blocks = blocks[n:]
	}
	close(jobs)
	for range writers {
		if e := <-errs; e != nil && err == nil {
			err = e
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fmt.Errorf("write content: %w", err)
	}
	return nil
}

// FillDevice writes new content to all of a device of size bytes.
func FillDevice(path string, m *Maker, size int64) error {
	return Write(path, m, sequence(0, size/BlockSize))
}
