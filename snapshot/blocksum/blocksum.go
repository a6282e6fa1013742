// SPDX-License-Identifier: BSD-2-Clause

// Package blocksum is the keyed 64-bit hash of a block, by which a compare
// scan tells blocks that changed from blocks that did not without fetching
// their data.
//
// It promises that two different blocks have the same sum with probability
// 2^-64, also where someone chooses the blocks without knowing the key. It is
// no proof of content: blobs are named by SHA-256 for that. It knows nothing
// of layers.
package blocksum

import (
	"encoding/binary"
	"fmt"

	"github.com/minio/highwayhash"
)

// Size is the length of a sum in bytes.
const Size = 8

// Key is the secret of a chain's sums; it is drawn with the chain's first
// snapshot and lies in device.json.
type Key [32]byte

// Sum is HighwayHash-64 of one block; the device's last block may be short.
func (k *Key) Sum(block []byte) uint64 { return highwayhash.Sum64(block, k[:]) }

// List is a sums file: the sums of a part's blocks with data, in device
// order, 8 bytes each, little-endian.
type List []byte

// Append adds a sum.
func (l List) Append(sum uint64) List { return binary.LittleEndian.AppendUint64(l, sum) }

// At is the sum of the i-th block with data.
func (l List) At(i int64) uint64 { return binary.LittleEndian.Uint64(l[i*Size:]) }

// Validate reports a list that does not hold exactly blocks sums.
func (l List) Validate(blocks int64) error {
	if int64(len(l)) != blocks*Size {
		return fmt.Errorf("sums of %d blocks take %d bytes, not %d: the file is damaged", blocks, blocks*Size, len(l))
	}
	return nil
}

// IsZero reports whether a block holds nothing but zeros.
func IsZero(block []byte) bool {
	for len(block) >= 64 {
		b := block[:64:64]
		le := binary.LittleEndian
		if le.Uint64(b)|le.Uint64(b[8:])|le.Uint64(b[16:])|le.Uint64(b[24:])|
			le.Uint64(b[32:])|le.Uint64(b[40:])|le.Uint64(b[48:])|le.Uint64(b[56:]) != 0 {
			return false
		}
		block = block[64:]
	}
	for _, c := range block {
		if c != 0 {
			return false
		}
	}
	return true
}
