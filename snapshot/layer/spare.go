// SPDX-License-Identifier: BSD-2-Clause

package layer

import "sync"

const (
	// maxSpare is the largest buffer that is used again, in bytes: few chunks are larger, and
	// memory of their size is not to be kept for those that are not. A buffer for a chunk has it
	// from the beginning, since to grow is to copy, and what is not used is not touched.
	maxSpare = 3 << 20
	// maxSpares is how many are kept: those of the workers, of what waits for one, and of the
	// blobs that are being filled.
	maxSpares = 8
)

// spares are buffers that are used again and again. (A sync.Pool loses them with each collection,
// and large ones bring about the next.)
type spares struct {
	mu   sync.Mutex
	free [][]byte
}

// get returns an empty buffer with room for n bytes.
func (s *spares) get(n int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, b := range s.free {
		if cap(b) >= n {
			s.free[i] = s.free[len(s.free)-1]
			s.free = s.free[:len(s.free)-1]
			return b[:0]
		}
	}
	return make([]byte, 0, n)
}

// put takes a buffer back that nobody uses any more; small ones are not worth a place.
func (s *spares) put(b []byte) {
	if cap(b) > maxSpare || cap(b) < gatherSize {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.free) < maxSpares {
		s.free = append(s.free, b)
	}
}
