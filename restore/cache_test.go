// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo"
)

// TestABlobCacheKeepsWhatFits: it never holds more than its limit, gives what was put and nothing
// else, and of blobs that are needed in turns, more than it holds, gives some again each time.
func TestABlobCacheKeepsWhatFits(t *testing.T) {
	const blobs, size = 40, 1000
	c := newBlobCache()
	if c.limit < leastKept || c.limit > mostKept {
		t.Errorf("a limit of %d bytes", c.limit)
	}
	c.limit = 20 * size
	blob := func(i int) (id repo.ID, plain []byte) {
		plain = bytes.Repeat([]byte{byte(i)}, size)
		binary.LittleEndian.PutUint64(id[:], uint64(i))
		return id, plain
	}
	found := 0
	for range 50 {
		for i := range blobs {
			id, want := blob(i)
			if got, ok := c.get(id); ok {
				if found++; !bytes.Equal(got, want) {
					t.Fatalf("blob %d is another", i)
				}
				continue
			}
			c.put(id, want)
			sum := 0
			for _, b := range c.blobs {
				sum += len(b)
			}
			if sum != c.bytes || sum > c.limit || len(c.ids) != len(c.blobs) {
				t.Fatalf("%d bytes are held, %d are counted, the limit is %d; %d names of %d", sum, c.bytes, c.limit, len(c.ids), len(c.blobs))
			}
		}
	}
	if found < 50*blobs/10 {
		t.Errorf("%d of %d looks found something", found, 50*blobs)
	}
	id, large := blob(99)
	if c.put(id, bytes.Repeat(large, 21)); len(c.blobs) == 0 {
		t.Error("a blob that is too large has driven out the others")
	}
}
