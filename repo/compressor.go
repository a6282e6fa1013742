// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"fmt"
	"math"
	"sync"
)

const (
	// goodEnough is by how much the fastest level's frame may be larger than
	// the default level's to be preferred. It costs a half to a fifth of the
	// time.
	goodEnough = 1.005
	// likeTheLast is how far the share that is saved of a blob may be from that
	// of the blob on which both levels were tried, for what was found there to
	// hold for it; and leastLike the same where next to nothing was saved: what
	// the fastest level finds little in may compress well all the same.
	likeTheLast = 0.06
	leastLike   = 0.005
	// smallBlob is the size below which both levels are tried on each blob: what
	// the fastest level finds depends on it, and it takes little time.
	smallBlob = 256 << 10
	// trustAtMost is how many blobs the outcome of a trial holds for.
	trustAtMost = 128
)

// compressor makes zstd frames. With CompressionAuto they are as small as those
// of zstd's default level, to half a percent, which is what restic uses; but
// where the fastest level compresses as well, as it does what has short repeats
// or nothing to be found, that is used. Both are tried on some blobs, and on
// those that turn out to compress differently from the last one tried.
type compressor struct {
	enc  encoder
	fast encoder // nil: do not look for a cheaper way

	mu     sync.Mutex
	prefer bool    // fast was good enough the last time both were tried
	share  float64 // of the blob that fast left then
	trust  int     // how many more blobs that is taken to hold for
	period int     // what trust began with
}

func newCompressor(mode Compression) (*compressor, error) { return newCompressorOf(mode, newEncoder) }

func newCompressorOf(mode Compression, encoder func(level) (encoder, error)) (*compressor, error) {
	l := levelDefault
	switch mode {
	case CompressionFastest:
		l = levelFastest
	case CompressionBetter:
		l = levelBetter
	case CompressionMax:
		l = levelBest
	}
	c := &compressor{}
	var err error
	if c.enc, err = encoder(l); err == nil && mode == CompressionAuto {
		c.fast, err = encoder(levelFastest)
	}
	if err != nil {
		return nil, fmt.Errorf("set up compression: %w", err)
	}
	return c, nil
}

// file appends a file's frame to dst.
func (c *compressor) file(plain, dst []byte) []byte { return c.enc.encode(plain, dst) }

// blob compresses a blob into a's memory, or b's, and gives both memories back,
// the frame first.
func (c *compressor) blob(plain, a, b []byte) (frame, other []byte) {
	if c.fast == nil {
		return c.enc.encode(plain, a[:0]), b
	}
	try, prefer, share := true, false, 0.0
	if len(plain) >= smallBlob {
		try, prefer, share = c.next()
	}
	if !try && !prefer {
		return c.enc.encode(plain, a[:0]), b
	}
	a = c.fast.encode(plain, a[:0])
	left := float64(len(a)) / float64(len(plain))
	if !try && alike(left, share) {
		return a, b
	}
	b = c.enc.encode(plain, b[:0])
	good := float64(len(a)) <= goodEnough*float64(len(b))
	if len(plain) >= smallBlob {
		c.learn(good, left)
	}
	if good {
		return a, b
	}
	return b, a
}

// next says whether to try both levels on a blob, and if not, what was learned.
func (c *compressor) next() (try, prefer bool, share float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trust--
	return c.trust < 0, c.prefer, c.share
}

// learn takes note of a trial. What is found again and again is trusted for
// longer. That fast is good enough has to be found twice before it is trusted at
// all: now and then the default level, too, misses what there is to find in a blob,
// which says nothing of the next one.
func (c *compressor) learn(good bool, share float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case good != c.prefer || good && !alike(share, c.share):
		c.period = 1
		if good {
			c.period = 0
		}
	case c.period == 0:
		c.period = 1
	default:
		c.period = min(2*c.period, trustAtMost)
	}
	c.prefer, c.share, c.trust = good, share, c.period
}

// alike reports whether what was found of a blob of which share is left holds for one
// of which left is left.
func alike(left, share float64) bool {
	return math.Abs(left-share) <= max(likeTheLast*(1-share), leastLike)
}
