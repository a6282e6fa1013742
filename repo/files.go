// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dsync-backup/dsync-backup/repo/backend"
)

// listed is a file of the store with a name that is an ID.
type listed struct {
	id   ID
	size int64
}

// listIDs lists the files of a type. What is not named by an ID is none of
// ours.
func listIDs(ctx context.Context, be backend.Backend, t backend.FileType) (out []listed, err error) {
	err = be.List(ctx, t, func(fi backend.FileInfo) error {
		if id, err := ParseID(fi.Name); err == nil {
			out = append(out, listed{id, fi.Size})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list %s files: %w", t, err)
	}
	return out, nil
}

func loadFile(ctx context.Context, be backend.Backend, h backend.Handle) ([]byte, error) {
	var buf bytes.Buffer
	err := loadFileTo(ctx, be, h, &buf)
	return buf.Bytes(), err
}

// loadFileTo loads a file instead of what buf holds.
func loadFileTo(ctx context.Context, be backend.Backend, h backend.Handle, buf *bytes.Buffer) error {
	return be.Load(ctx, h, 0, 0, func(rd io.Reader) error {
		buf.Reset()
		_, err := buf.ReadFrom(rd)
		return err
	})
}

// loadRaw loads a file as stored and checks that it is what its name says.
func (r *Repository) loadRaw(ctx context.Context, t backend.FileType, id ID) ([]byte, error) {
	data, err := loadNamed(ctx, r.be, t, id)
	if err != nil {
		return nil, err
	}
	return data, nil
}

// loadNamed is loadRaw that also gives the bytes of a file that is [ErrDamaged]. It
// loads a second time before it believes that.
func loadNamed(ctx context.Context, be backend.Backend, t backend.FileType, id ID) ([]byte, error) {
	h := backend.Handle{Type: t, Name: id.String()}
	for attempt := 0; ; attempt++ {
		data, err := loadFile(ctx, be, h)
		if err != nil {
			return nil, fmt.Errorf("load %s %s: %w", t, id.Str(), err)
		}
		if Hash(data) == id {
			return data, nil
		}
		if attempt > 0 {
			return data, fmt.Errorf("load %s %s: its %d bytes do not match its name: %w", t, id.Str(), len(data), ErrDamaged)
		}
	}
}

// loadUnpacked loads and decodes a file that is neither pack, key nor config.
func (r *Repository) loadUnpacked(ctx context.Context, t backend.FileType, id ID) ([]byte, error) {
	raw, err := r.loadRaw(ctx, t, id)
	if err != nil {
		return nil, err
	}
	return r.openUnpacked(t, id, raw)
}

func (r *Repository) openUnpacked(t backend.FileType, id ID, raw []byte) ([]byte, error) {
	plain, err := r.codec.openFile(raw, r.cfg.Version)
	if err != nil {
		return nil, fmt.Errorf("decode %s %s: %w: %w", t, id.Str(), ErrDamaged, err)
	}
	return plain, nil
}

// saveUnpacked stores a file that is neither pack, key nor config and returns
// its name and bytes. It decodes it again first.
func (r *Repository) saveUnpacked(ctx context.Context, t backend.FileType, plain []byte) (ID, []byte, error) {
	raw := r.codec.sealFile(plain, r.cfg.Version)
	again, err := r.codec.openFile(bytes.Clone(raw), r.cfg.Version)
	if err == nil && !bytes.Equal(again, plain) {
		err = errors.New("it decodes to something else")
	}
	if err != nil {
		return ID{}, nil, fmt.Errorf("check a new %s file before saving it (bad memory?): %w", t, err)
	}
	id := Hash(raw)
	if err := r.be.Save(ctx, backend.Handle{Type: t, Name: id.String()}, raw); err != nil {
		return ID{}, nil, fmt.Errorf("save %s %s: %w", t, id.Str(), err)
	}
	return id, raw, nil
}
