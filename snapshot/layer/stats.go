// SPDX-License-Identifier: BSD-2-Clause

package layer

import "context"

// Stats says what a layer describes; sizes are in bytes of the device.
type Stats struct {
	Parts     int   `json:"parts"`
	Extents   int   `json:"extents"`
	DataBytes int64 `json:"data_bytes"`
	ZeroBytes int64 `json:"zero_bytes"`
}

// Stats reads the layer's indexes and adds them up.
func (l *Layer) Stats(ctx context.Context, from Loader) (Stats, error) {
	s := Stats{Parts: len(l.parts)}
	for _, ref := range l.parts {
		p, err := openPart(ctx, from, ref)
		if err != nil {
			return s, err
		}
		s.Extents += len(p.Index.Extents)
		for _, e := range p.Index.Extents {
			if e.Zero {
				s.ZeroBytes += e.Length
			} else {
				s.DataBytes += e.Length
			}
		}
	}
	return s, nil
}
