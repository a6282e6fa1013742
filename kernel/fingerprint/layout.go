// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"context"
	"fmt"
)

const (
	headSize  = 72 << 10  // of a region: every superblock that is looked for
	bootArea  = 64 << 10  // of a file system: boot code, superblock, first descriptors
	maxPlain  = 64 << 20  // hashed whole, of a device
	maxRead   = 256 << 20 // of a device, in all
	maxNested = 2         // partition tables within partitions
)

// doubt ends a layout: why nothing can be proved.
type doubt struct{ reason string }

func (d doubt) Error() string { return d.reason }

func doubtf(format string, args ...any) error { return doubt{fmt.Sprintf(format, args...)} }

// witnessed is a part with the bytes that its digest is made of.
type witnessed struct {
	Part
	spans []span
}

// walker finds a witness for every byte of a device. What it reads was written
// by anybody: each length is checked against the region, and reads are counted.
type walker struct {
	ctx   context.Context
	src   Source
	plain int64 // bytes that may still be hashed whole
	left  int64 // bytes that may still be read
	parts []witnessed
}

// layout covers the device with parts; a doubt as error says why it cannot.
func layout(ctx context.Context, src Source, size int64) ([]witnessed, error) {
	w := &walker{ctx: ctx, src: src, plain: maxPlain, left: maxRead}
	if err := w.region(span{0, size}, 0); err != nil {
		return nil, err
	}
	return w.parts, nil
}

// region covers a device or a partition.
func (w *walker) region(r span, depth int) error {
	head, err := w.read(r.clip(span{r.off, headSize}))
	if err != nil {
		return err
	}
	kinds, err := w.probe(r, head)
	if err != nil {
		return err
	}
	switch {
	case len(kinds) == 0:
		return w.unknown(r, "nothing that is known")
	case len(kinds) > 1:
		return w.unknown(r, fmt.Sprintf("both %s and %s", kinds[0], kinds[1]))
	}
	switch kinds[0] {
	case "ext4":
		return w.ext4(r, head)
	case "xfs":
		return w.xfs(r, head)
	case "gpt", "mbr":
		if depth == maxNested {
			return w.unknown(r, "a partition table in a partition in a partition")
		}
		return w.table(r, head, kinds[0], depth)
	}
	return w.unknown(r, kinds[0])
}

// unknown hashes a region whole if it is small: that proves all. A large one
// ends in doubt.
func (w *walker) unknown(r span, what string) error {
	if r.len > w.plain {
		return doubtf("at byte %d is %s, %d bytes, of which writes leave no trace that is known", r.off, what, r.len)
	}
	return w.add(Part{Offset: r.off, Length: r.len, Kind: "data"}, nil, []span{r})
}

// add takes on a part; whole are those of its spans that count against what may
// be hashed whole.
func (w *walker) add(p Part, spans, whole []span) error {
	for _, s := range whole {
		if w.plain -= s.len; w.plain < 0 {
			return doubtf("more than %d bytes are outside of any file system, at byte %d among others", int64(maxPlain), s.off)
		}
	}
	spans = append(spans, whole...)
	for _, s := range spans {
		if err := w.spend(s.len); err != nil {
			return err
		}
	}
	w.parts = append(w.parts, witnessed{p, spans})
	return nil
}

func (w *walker) spend(n int64) error {
	if w.left -= n; w.left < 0 {
		return doubtf("more than %d bytes would have to be read", int64(maxRead))
	}
	return nil
}

func (w *walker) read(s span) ([]byte, error) {
	if err := w.spend(s.len); err != nil {
		return nil, err
	}
	buf := make([]byte, s.len)
	if len(buf) == 0 {
		return buf, nil
	}
	return buf, w.src.ReadExtent(w.ctx, buf, s.off)
}

// slack is what lies behind the end of a file system in its region.
func slack(r span, size int64) []span {
	if size == r.len {
		return nil
	}
	return []span{{r.off + size, r.len - size}}
}
