// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
)

// ParseSize reads a size in bytes as restic does: a number, and K, M, G or T for
// a power of 1024, or B.
func ParseSize(s string) (int64, error) {
	fail := fmt.Errorf("size %q: want a number of bytes, with K, M, G or T behind it if you like", s)
	if s == "" {
		return 0, fail
	}
	unit, number := uint64(1), s[:len(s)-1]
	switch s[len(s)-1] {
	case 'b', 'B':
	case 'k', 'K':
		unit = 1 << 10
	case 'm', 'M':
		unit = 1 << 20
	case 'g', 'G':
		unit = 1 << 30
	case 't', 'T':
		unit = 1 << 40
	default:
		number = s
	}
	n, err := strconv.ParseUint(number, 10, 63)
	hi, lo := bits.Mul64(n, unit)
	if err != nil || hi != 0 || lo > math.MaxInt64 {
		return 0, fail
	}
	return int64(lo), nil
}
