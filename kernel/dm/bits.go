// SPDX-License-Identifier: BSD-2-Clause

package dm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// pieceSize is how much of a bitmap is read at once, in bytes: 32 GiB of the
// device.
const pieceSize = 1 << 20

// The files of the module that hold bitmaps.
const (
	fileActive = "active"
	fileFrozen = "frozen"
)

// addBits unites one of the module's bitmaps into b. It reads only what
// SEEK_DATA finds: pages of the bitmap in which something is marked.
func addBits(dir, file string, b *kernel.Bitmap) error {
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		return fmt.Errorf("open the module's bitmap: %w", err)
	}
	defer f.Close()
	// A bitmap of another epoch would otherwise pass for one that is clean
	// where it has ended.
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil && end != (b.Blocks()+7)/8 {
		err = fmt.Errorf("%w: %d bytes for %d blocks", errChanged, end, b.Blocks())
	}
	if err == nil {
		err = addData(f, b)
	}
	if err != nil {
		return fmt.Errorf("read the module's bitmap %s: %w", f.Name(), err)
	}
	return nil
}

// errChanged says that what was read belongs to another state than the status
// that was read before.
var errChanged = errors.New("it changed meanwhile")

func addData(f *os.File, b *kernel.Bitmap) error {
	length := (b.Blocks() + 7) / 8
	buf := make([]byte, min(pieceSize, (length+7)/8*8))
	for at := int64(0); at < length; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // nothing more is marked
		}
		if err != nil {
			return fmt.Errorf("seek what is marked: %w", err)
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("seek what is not marked: %w", err)
		}
		// Whole words, which also makes each step one forward.
		data, hole = max(at, data/8*8), min(hole, length)
		if hole <= data {
			return errors.New("its holes make no sense")
		}
		for at = data; at < hole; {
			n := min(hole-at, int64(len(buf)))
			if err := addPiece(f, b, buf, at, n); err != nil {
				return err
			}
			at += n
		}
		at = (at + 7) / 8 * 8
	}
	return nil
}

// addPiece unites n bytes of the file at a multiple of 8. Bit i%8 of byte i/8
// is block i, so a word is little-endian.
func addPiece(f *os.File, b *kernel.Bitmap, buf []byte, at, n int64) error {
	if got, err := f.ReadAt(buf[:n], at); int64(got) != n {
		return fmt.Errorf("%d bytes at %d: got %d: %w", n, at, got, errors.Join(err, io.ErrUnexpectedEOF))
	}
	padded := buf[:(n+7)/8*8]
	clear(padded[n:])
	for i := 0; i < len(padded); i += 8 {
		if w := binary.LittleEndian.Uint64(padded[i:]); w != 0 {
			b.OrWord(int(at)/8+i/8, w)
		}
	}
	return nil
}
