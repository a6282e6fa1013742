// SPDX-License-Identifier: BSD-2-Clause

// Package rabin cuts data where restic does, faster.
//
// restic cuts a stream behind each byte at which the Rabin fingerprint of the 64 bytes before is
// zero in its lowest 20 bits, but not before 512 KiB and never behind 8 MiB (Rabin, "Fingerprinting
// by Random Polynomials", 1981; the parameters are those of github.com/restic/chunker). To roll a
// fingerprint on by a byte takes some ten cycles, most of them waiting for the one before. As it
// depends on nothing but those 64 bytes, several stretches of the data can be looked through at
// once, each from a fingerprint made anew: that is what this package does.
package rabin

import "github.com/restic/chunker"

const (
	windowSize = 64
	splitMask  = 1<<20 - 1

	// stretch is how many bytes each of the lanes looks at in a turn. A fingerprint made anew costs
	// windowSize bytes; what lies behind a cut was looked at for nothing.
	stretch = 4096
	lanes   = 4

	// usualShift is that of a polynomial of the degree that restic draws, 53.
	usualShift = 45
)

// Chunker finds the ends of chunks. It is for one goroutine at a time.
type Chunker struct {
	shift    uint
	out, mod [256]uint64

	count  int // bytes of the chunk so far
	digest uint64
	window [windowSize]byte // the last bytes, from at on in a ring
	at     int
}

// New returns a chunker for a repository's polynomial, which must have a degree of 16 to 53.
func New(pol chunker.Pol) *Chunker {
	deg := pol.Deg()
	c := &Chunker{shift: uint(deg - 8)}
	appendByte := func(h chunker.Pol, b byte) chunker.Pol { return (h<<8 | chunker.Pol(b)).Mod(pol) }
	for b := range 256 {
		// What a byte adds to the fingerprint when it is about to leave the window.
		h := appendByte(0, byte(b))
		for range windowSize - 1 {
			h = appendByte(h, 0)
		}
		c.out[b] = uint64(h)
		// What takes the eight bits above the degree away again, and what they are modulo pol.
		high := chunker.Pol(b) << uint(deg)
		c.mod[b] = uint64(high.Mod(pol) | high)
	}
	c.Reset()
	return c
}

// Reset begins a new chunk.
func (c *Chunker) Reset() {
	c.count, c.digest, c.at = 0, 0, 0
	clear(c.window[:])
}

// Next looks for the end of the chunk in b, which follows what it was given since the chunk's
// beginning. It returns how many bytes of b belong to the chunk, and begins the next one; or -1 if
// all do, and the chunk goes on.
func (c *Chunker) Next(b []byte) int {
	p := 0
	if skip := chunker.MinSize - windowSize - c.count; skip > 0 {
		if skip >= len(b) {
			c.count += len(b)
			return -1
		}
		c.count += skip
		p = skip
	}
	start := p
	for p < len(b) {
		// Whoever looks at many bytes at once needs those before in b, and a whole window.
		room := min(len(b)-p, chunker.MaxSize-1-c.count)
		if p-start >= windowSize && room >= lanes*stretch && c.shift == usualShift {
			if c.clean(b, p) {
				p += lanes * stretch
				c.count += lanes * stretch
				continue
			}
			// The end is in these: find it byte by byte.
			if n := c.scan(b, p, p+lanes*stretch); n > 0 {
				return n
			}
			p += lanes * stretch
			continue
		}
		end := min(len(b), p+windowSize)
		if p-start >= windowSize {
			end = len(b)
		}
		if n := c.scan(b, p, end); n > 0 {
			return n
		}
		p = end
	}
	return -1
}

// scan goes on from p to end, one byte after the other, and returns where the chunk ends, or 0.
func (c *Chunker) scan(b []byte, p, end int) int {
	digest, at, shift := c.digest, c.at, c.shift&63
	for i := p; i < end; i++ {
		digest ^= c.out[c.window[at%windowSize]]
		c.window[at%windowSize] = b[i]
		at++
		digest = (digest<<8 | uint64(b[i])) ^ c.mod[byte(digest>>shift)]
		c.count++
		if (digest&splitMask == 0 || c.count >= chunker.MaxSize) && c.count >= chunker.MinSize {
			c.Reset()
			return i + 1
		}
	}
	c.digest, c.at = digest, at%windowSize
	return 0
}

// clean reports whether the chunk ends nowhere in the lanes*stretch bytes from p on, and if so,
// goes on behind them. The window lies before p.
func (c *Chunker) clean(b []byte, p int) bool {
	const shift = usualShift // a constant, as everything in the loop counts
	var d [lanes]uint64
	d[0] = c.digest
	for k := 1; k < lanes; k++ {
		for _, v := range b[p+k*stretch-windowSize:][:windowSize] {
			d[k] = (d[k]<<8 | uint64(v)) ^ c.mod[byte(d[k]>>shift)]
		}
	}
	// One pointer and constants beside it, so that all stays in registers.
	w := (*[windowSize + lanes*stretch]byte)(b[p-windowSize:])
	d0, d1, d2, d3 := d[0], d[1], d[2], d[3]
	for i := range stretch {
		d0 ^= c.out[w[i]]
		d1 ^= c.out[w[i+stretch]]
		d2 ^= c.out[w[i+2*stretch]]
		d3 ^= c.out[w[i+3*stretch]]
		d0 = (d0<<8 | uint64(w[windowSize+i])) ^ c.mod[byte(d0>>shift)]
		d1 = (d1<<8 | uint64(w[windowSize+i+stretch])) ^ c.mod[byte(d1>>shift)]
		d2 = (d2<<8 | uint64(w[windowSize+i+2*stretch])) ^ c.mod[byte(d2>>shift)]
		d3 = (d3<<8 | uint64(w[windowSize+i+3*stretch])) ^ c.mod[byte(d3>>shift)]
		if d0&splitMask == 0 || d1&splitMask == 0 || d2&splitMask == 0 || d3&splitMask == 0 {
			return false
		}
	}
	c.digest, c.at = d3, 0
	copy(c.window[:], w[lanes*stretch:])
	return true
}
