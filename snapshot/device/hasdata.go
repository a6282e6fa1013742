// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/dsync-backup/dsync-backup/kernel"
)

const (
	sampleEdge  = 1 << 20 // read from both ends
	sampleCount = 256     // blocks read in between
	sampleBlock = 4096
)

// HasData says what a target holds, for a refusal to overwrite it: "an xfs
// file system", "a GPT partition table", "data at byte 4096", or "" if no
// superblock or table is known there and a sample of it (both ends, and 256
// blocks spread over its data) reads as zeros. A target that does not exist
// holds nothing.
func HasData(ctx context.Context, path string) (string, error) {
	d, err := Open(path, Options{})
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer d.Close()
	head, err := d.head(ctx)
	if err != nil {
		return "", err
	}
	if sig, ok := probe(head); ok {
		return describeSignature(sig.Type), nil
	}
	if t, ok := parseTable(head, d.sector); ok {
		return fmt.Sprintf("a %s partition table", t.kind), nil
	}
	extents, err := d.DataExtents(ctx)
	if err != nil {
		return "", err
	}
	return d.sample(ctx, extents)
}

func describeSignature(name string) string {
	switch name {
	case "swap":
		return "a swap area"
	case "LVM2_member":
		return "an LVM physical volume"
	case "linux_raid_member":
		return "a member of an md array"
	case "crypto_LUKS":
		return "a LUKS encrypted volume"
	case "bcache":
		return "a bcache superblock"
	}
	return "a file system: " + name
}

func (d *Device) sample(ctx context.Context, extents []kernel.Extent) (string, error) {
	buf := AlignedBuffer(sampleEdge)
	look := func(off, length int64) (string, error) {
		b := buf[:min(length, d.size-off)]
		if err := d.ReadExtent(ctx, b, off); err != nil {
			return "", err
		}
		for i, v := range b {
			if v != 0 {
				return fmt.Sprintf("data at byte %d", off+int64(i)), nil
			}
		}
		return "", nil
	}
	total := kernel.TotalLength(extents)
	step := max(total/sampleCount/sampleBlock*sampleBlock, sampleBlock)
	next, seen := int64(0), int64(0) // in bytes of data, not of the device
	for i, e := range extents {
		if i == 0 {
			if found, err := look(e.Offset, min(e.Length, sampleEdge)); found != "" || err != nil {
				return found, err
			}
		}
		for ; next < seen+e.Length; next += step {
			if found, err := look(e.Offset+next-seen, sampleBlock); found != "" || err != nil {
				return found, err
			}
		}
		seen += e.Length
	}
	if n := len(extents); n > 0 {
		last := extents[n-1]
		length := min(last.Length, sampleEdge)
		return look(last.End()-length, length)
	}
	return "", nil
}
