// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/pack"
)

// PackReport is what reading a whole pack shows.
type PackReport struct {
	Problem string         // of the file as a whole; "" if there is none
	Unread  error          // why the store does not give the file, if that is the problem
	Blobs   []BlobLocation // as the header lists them; nil if it cannot be read
	// Bad are blobs that cannot be had from this pack, and why.
	Bad map[BlobLocation]error
}

// ReadPack reads a pack of size bytes from end to end: whether its bytes match its
// name, its header can be read, and each blob is what its ID says. entries, what the
// index lists, are looked at too where the header does not have them; nil if only the
// header is to be believed. If the store gives the pack, but for good not all of
// it, as a disk with a bad sector does, they are read one by one. An error means
// that the store did not give the pack. It reads a second time before it believes
// in damage. Memory: the pack, and twice the largest of its blobs.
func (r *Repository) ReadPack(ctx context.Context, id ID, size int64, entries []BlobLocation) (PackReport, error) {
	// All at once, and a little more, in which the end is found; of a listing that is
	// wrong only as much as a pack may have.
	file := bytes.NewBuffer(make([]byte, 0, min(max(size, 0), 2*MaxPackSize)+bytes.MinRead))
	rep, err := r.readPackOnce(ctx, id, file, entries)
	if err == nil && (rep.Problem != "" || len(rep.Bad) > 0) {
		rep, err = r.readPackOnce(ctx, id, file, entries)
	}
	return rep, err
}

func (r *Repository) readPackOnce(ctx context.Context, id ID, file *bytes.Buffer, entries []BlobLocation) (rep PackReport, err error) {
	err = loadFileTo(ctx, r.be, packHandle(id), file)
	if err != nil && unreadable(err) {
		rep.Unread, rep.Problem = err, fmt.Sprintf("it cannot be read: %v", err)
		rep.Bad, err = r.readBlobs(ctx, id, entries)
		return rep, err
	}
	if err != nil {
		return rep, fmt.Errorf("read pack %s: %w", id.Str(), err)
	}
	data := file.Bytes()
	if Hash(data) != id {
		rep.Problem = fmt.Sprintf("its %d bytes do not match its name", len(data))
	}
	rep.Blobs, err = pack.ReadHeader(r.key, int64(len(data)), func(p []byte, offset int64) error {
		_, err := bytes.NewReader(data).ReadAt(p, offset)
		return err
	})
	if err != nil {
		rep.Blobs = nil
		if rep.Problem == "" {
			rep.Problem = err.Error()
		}
	}
	rep.Bad = map[BlobLocation]error{}
	looked := make(map[BlobLocation]bool, len(rep.Blobs)+len(entries))
	var sealed, plain []byte
	for _, list := range [][]BlobLocation{rep.Blobs, entries} {
		for _, b := range list {
			if looked[b] {
				continue
			}
			looked[b] = true
			end := uint64(b.Offset) + uint64(b.Length)
			if end > uint64(len(data)) {
				rep.Bad[b] = fmt.Errorf("%s lies behind the end of the file", b.Handle)
				continue
			}
			// A copy, since it is opened where it lies and another entry may overlap.
			sealed = append(sealed[:0], data[b.Offset:end]...)
			opened, err := r.codec.openBlob(plain, b, sealed)
			if err != nil {
				rep.Bad[b] = fmt.Errorf("%s: %w", b.Handle, err)
			} else if b.Compressed() { // else it lies in sealed
				plain = opened
			}
		}
	}
	return rep, nil
}

// readBlobs reads blobs of a pack one by one, and says which cannot be had.
func (r *Repository) readBlobs(ctx context.Context, id ID, blobs []BlobLocation) (map[BlobLocation]error, error) {
	bad := map[BlobLocation]error{}
	for _, b := range blobs {
		here := Location{Pack: id, Offset: b.Offset, Length: b.Length, UncompressedLength: b.UncompressedLength}
		_, err := r.loadAt(ctx, b.Handle, KindData, here)
		switch {
		case err == nil:
		case errors.Is(err, ErrDamaged) || unreadable(err):
			bad[b] = err
		default:
			return bad, err
		}
	}
	return bad, nil
}

// unreadable reports an error of one file, or of a place in it, that no retry
// mends: not of a store that is gone, nor of a file that is.
func unreadable(err error) bool {
	return errors.Is(err, backend.ErrPermanent) && !errors.Is(err, backend.ErrNoStore) && !errors.Is(err, backend.ErrNotExist)
}
