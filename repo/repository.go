// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/restic/chunker"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// Repository is an open repository. All its methods are safe for concurrent
// use.
type Repository struct {
	be    backend.Backend
	key   *crypto.Key
	cfg   config
	opts  Options
	codec *codec
	cache *cache // nil if there is none
	log   *slog.Logger

	tables tableSet
	loadMu sync.Mutex // one change of the set of tables at a time

	locks knownLocks

	indexShrank atomic.Bool // index files that the cache knew are gone
}

type config struct {
	Version           uint        `json:"version"`
	ID                string      `json:"id"`
	ChunkerPolynomial chunker.Pol `json:"chunker_polynomial"`
}

// Init makes a new repository of format version 2 and opens it. A store that
// holds a config, a key or a snapshot is [ErrExist].
func Init(ctx context.Context, be backend.Backend, password string, opts Options) (*Repository, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	if password == "" {
		return nil, errors.New("create repository: the password is empty")
	}
	if err := mustBeEmpty(ctx, be); err != nil {
		return nil, fmt.Errorf("create repository at %s: %w", be.Location(), err)
	}
	pol, err := chunker.RandomPolynomial()
	if err != nil {
		return nil, fmt.Errorf("create repository: draw chunker polynomial: %w", err)
	}
	var id [32]byte
	_, _ = rand.Read(id[:])
	r := &Repository{
		be: be, opts: opts, log: opts.Logger, key: crypto.NewKey(),
		cfg: config{Version: 2, ID: hex.EncodeToString(id[:]), ChunkerPolynomial: pol},
	}
	if err := be.Create(ctx); err != nil {
		return nil, fmt.Errorf("create repository at %s: %w", be.Location(), err)
	}
	if err := r.addKey(ctx, password, opts.KDF); err != nil {
		return nil, fmt.Errorf("create repository at %s: %w", be.Location(), err)
	}
	// The config comes last: without it there is no repository.
	plain, err := json.Marshal(r.cfg)
	if err != nil {
		return nil, fmt.Errorf("create repository: encode config: %w", err)
	}
	if err := be.Save(ctx, backend.Handle{Type: backend.ConfigFile}, r.key.Seal(nil, plain)); err != nil {
		if errors.Is(err, backend.ErrExist) {
			err = ErrExist
		}
		return nil, fmt.Errorf("create repository at %s: %w", be.Location(), err)
	}
	return r, r.start()
}

// mustBeEmpty looks for what a repository leaves even when its config is gone,
// for example where a store expires old files.
func mustBeEmpty(ctx context.Context, be backend.Backend) error {
	_, err := be.Stat(ctx, backend.Handle{Type: backend.ConfigFile})
	if err == nil {
		return ErrExist
	}
	if !errors.Is(err, backend.ErrNotExist) {
		return err
	}
	for _, t := range []backend.FileType{backend.KeyFile, backend.SnapshotFile} {
		err := be.List(ctx, t, func(backend.FileInfo) error {
			return fmt.Errorf("it holds %s files but no config: %w", t, ErrExist)
		})
		if err != nil && !errors.Is(err, backend.ErrNoStore) {
			return err
		}
	}
	return nil
}

// Open opens the repository in be with the first key that the password fits.
// Errors: [ErrNoRepository], [ErrWrongPassword].
func Open(ctx context.Context, be backend.Backend, password string, opts Options) (*Repository, error) {
	return OpenWith(ctx, be, func(context.Context) (string, error) { return password, nil }, opts)
}

// OpenWith is Open that asks for the password only if it needs one: not if
// opts.Keys has a key for the repository.
func OpenWith(ctx context.Context, be backend.Backend, password func(context.Context) (string, error), opts Options) (*Repository, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	sealed, err := loadFile(ctx, be, backend.Handle{Type: backend.ConfigFile})
	if errors.Is(err, backend.ErrNotExist) {
		return nil, fmt.Errorf("open repository at %s: %w", be.Location(), ErrNoRepository)
	} else if err != nil {
		return nil, fmt.Errorf("open repository at %s: %w", be.Location(), err)
	}
	r := &Repository{be: be, opts: opts, log: opts.Logger}
	if r.key, err = findKept(ctx, be, opts); err != nil {
		return nil, fmt.Errorf("open repository at %s: %w", be.Location(), err)
	}
	if r.key == nil {
		text, err := password(ctx)
		if err != nil {
			return nil, err
		}
		if r.key, err = findKey(ctx, be, text, opts); err != nil {
			return nil, fmt.Errorf("open repository at %s: %w", be.Location(), err)
		}
	}
	plain, err := r.key.Open(nil, sealed)
	if err != nil {
		return nil, fmt.Errorf("open repository at %s: config: %w: %w", be.Location(), ErrDamaged, err)
	}
	if err := json.Unmarshal(plain, &r.cfg); err != nil {
		return nil, fmt.Errorf("open repository at %s: decode config: %w", be.Location(), err)
	}
	if r.cfg.Version < 1 || r.cfg.Version > 2 {
		return nil, fmt.Errorf("open repository at %s: format version %d is not known to this program", be.Location(), r.cfg.Version)
	}
	if !r.cfg.ChunkerPolynomial.Irreducible() {
		return nil, fmt.Errorf("open repository at %s: its chunker polynomial is not valid", be.Location())
	}
	return r, r.start()
}

// start prepares what does not depend on how the repository came to be.
func (r *Repository) start() (err error) {
	if r.codec, err = newCodec(r.key, r.opts.Compression); err != nil {
		return err
	}
	if r.opts.CacheDir == "" {
		return nil
	}
	// A cache only saves time: without it everything works.
	if r.cache, err = openCache(r.opts.CacheDir, r.cfg.ID, r.log); err != nil {
		r.log.Warn("going on without a cache", "error", err)
		r.cache = nil
	}
	return nil
}

// ID is the repository's own ID, in hex.
func (r *Repository) ID() string { return r.cfg.ID }

// Version is the version of the repository's format: 1 or 2.
func (r *Repository) Version() int { return int(r.cfg.Version) }

// ChunkerPolynomial is what restic cuts files with in this repository.
func (r *Repository) ChunkerPolynomial() chunker.Pol { return r.cfg.ChunkerPolynomial }

// PackSize is the size that packs are filled up to, in bytes.
func (r *Repository) PackSize() int64 { return int64(r.opts.PackSize) }

// Location is where the repository is, for messages.
func (r *Repository) Location() string { return r.be.Location() }

// Backend is the store itself, for whoever checks or cleans it.
func (r *Repository) Backend() backend.Backend { return r.be }

// RequireWritable is [ErrVersion1], with the way out, for a repository of a
// format that is only read.
func (r *Repository) RequireWritable() error {
	if r.cfg.Version < 2 {
		return fmt.Errorf("%w, which can only be read: upgrade it with `restic migrate upgrade_repo_v2`", ErrVersion1)
	}
	return nil
}

// DeferCache holds back every change of the cache folder, in memory, until it
// is called with false: the cache may lie on a file system that is about to be
// frozen. Reading the cache goes on.
func (r *Repository) DeferCache(on bool) {
	if r.cache != nil {
		r.cache.setDeferred(on)
	}
}

// Close lets go of the local files, after it has written what DeferCache held
// back: not while the cache's file system is frozen. It leaves the backend open,
// since the caller opened it.
func (r *Repository) Close() error {
	r.DeferCache(false)
	return r.tables.close()
}
