// SPDX-License-Identifier: BSD-2-Clause

package device

import "context"

// Source is where the content of a device is read. Its methods may be called from many
// goroutines.
type Source interface {
	// ReadExtents does all the reads, up to most at once, or fails. Their memory lies as
	// O_DIRECT asks.
	ReadExtents(ctx context.Context, reads []Read, most int) error
	// Buffer returns n bytes of such memory.
	Buffer(n int) []byte
}

// DefaultParallel is how many reads are in flight where nothing else is asked for.
const DefaultParallel = 64

// Standing reads a device only while what it holds is what is asked for: until a context ends.
type Standing struct {
	*Device
	Until context.Context //nolint:containedctx // as long as one instant
}

// ReadExtents implements [Source].
func (s Standing) ReadExtents(ctx context.Context, reads []Read, most int) error {
	if err := context.Cause(s.Until); err != nil {
		return err
	}
	return s.Device.ReadExtents(ctx, reads, most)
}

// Buffer implements [Source].
func (Standing) Buffer(n int) []byte { return AlignedBuffer(n) }
