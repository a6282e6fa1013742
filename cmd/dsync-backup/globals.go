// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/limit"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/repo/keyring"
	"github.com/dsync-backup/dsync-backup/snapshot/freeze"
)

// globals are the flags that every command has, and what commands share.
type globals struct {
	stdout, stderr *freeze.HoldOutput

	repo            string
	repoFile        string
	passwordFile    string
	passwordCommand string
	stateDir        string
	cacheDir        string
	noCache         bool
	noLock          bool
	json            bool
	quiet           bool
	verbose         int
	retryLock       time.Duration
	limitUpload     int
	limitDownload   int
	packSize        uint
	compression     string
	caCert          string
	tlsClientCert   string
	retryBudget     time.Duration
	keyring         string
	extended        []string

	closers []func() error
}

func (g *globals) register(f *pflag.FlagSet) {
	f.StringVarP(&g.repo, "repo", "r", os.Getenv("RESTIC_REPOSITORY"), "`repository`: /path or s3:http://host:9000/bucket/prefix (default: $RESTIC_REPOSITORY)")
	f.StringVar(&g.repoFile, "repository-file", os.Getenv("RESTIC_REPOSITORY_FILE"), "`file` to read the repository's location from (default: $RESTIC_REPOSITORY_FILE)")
	f.StringVarP(&g.passwordFile, "password-file", "p", os.Getenv("RESTIC_PASSWORD_FILE"), "`file` to read the repository's password from (default: $RESTIC_PASSWORD_FILE)")
	f.StringVar(&g.passwordCommand, "password-command", os.Getenv("RESTIC_PASSWORD_COMMAND"), "shell `command` that prints the password (default: $RESTIC_PASSWORD_COMMAND)")
	f.StringVar(&g.keyring, "keyring", os.Getenv("DSYNC_KEYRING"), "keep what is derived from the password in the kernel's keyring for this `duration`, such as 1h: until then the repository opens for this user without the password (default: $DSYNC_KEYRING, else not)")
	f.StringVar(&g.stateDir, "state-dir", envOr("DSYNC_STATE_DIR", "/var/lib/dsync-backup"), "`folder` of the epoch log (default: $DSYNC_STATE_DIR)")
	f.StringVar(&g.cacheDir, "cache-dir", defaultCacheDir(), "`folder` of the local cache")
	f.BoolVar(&g.noCache, "no-cache", false, "do without a local cache")
	f.BoolVar(&g.noLock, "no-lock", false, "take no lock: for commands that only read, on a store that cannot be written to")
	f.BoolVar(&g.json, "json", false, "print JSON to stdout, one object a line")
	f.BoolVarP(&g.quiet, "quiet", "q", false, "no progress")
	f.CountVarP(&g.verbose, "verbose", "v", "say more")
	f.DurationVar(&g.retryLock, "retry-lock", 0, "go on trying to lock the repository for this `duration`")
	f.IntVar(&g.limitUpload, "limit-upload", 0, "upload at most this many `KiB/s` (0: no limit)")
	f.IntVar(&g.limitDownload, "limit-download", 0, "download at most this many `KiB/s` (0: no limit)")
	f.UintVar(&g.packSize, "pack-size", 16, "size of packs in `MiB`, 4 to 128")
	f.StringVar(&g.compression, "compression", envOr("RESTIC_COMPRESSION", "auto"), "`mode`: auto, off, fastest, better or max")
	f.StringVar(&g.caCert, "cacert", os.Getenv("RESTIC_CACERT"), "`file` with root certificates for https")
	f.StringVar(&g.tlsClientCert, "tls-client-cert", os.Getenv("RESTIC_TLS_CLIENT_CERT"), "`file` with a certificate and its private key for https")
	f.DurationVar(&g.retryBudget, "retry-store", 0, "go on for this `duration` when the store fails (default 15m)")
	f.StringArrayVarP(&g.extended, "option", "o", nil, "extended option of the store, `key=value`, such as s3.region=eu-west-1")
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func defaultCacheDir() string {
	if dir := os.Getenv("DSYNC_CACHE_DIR"); dir != "" {
		return dir
	}
	// A service of root has no home; it has /var/cache.
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = "/var/cache"
	}
	return filepath.Join(dir, "dsync-backup")
}

func (g *globals) logger() *slog.Logger {
	level := slog.LevelWarn
	if g.verbose > 0 {
		level = slog.LevelInfo
	}
	if g.verbose > 1 {
		level = slog.LevelDebug
	}
	o := &slog.HandlerOptions{Level: level}
	if g.json {
		return slog.New(slog.NewJSONHandler(g.stderr, o))
	}
	return slog.New(slog.NewTextHandler(g.stderr, o))
}

func (g *globals) warn(err error) {
	if g.json {
		g.printJSON(g.stderr, map[string]string{"message_type": "warning", "message": err.Error()})
		return
	}
	fmt.Fprintln(g.stderr, "dsync-backup: warning:", err)
}

func (g *globals) options() (repo.Options, error) {
	c, err := repo.ParseCompression(g.compression)
	if err != nil {
		return repo.Options{}, err
	}
	o := repo.Options{Compression: c, PackSize: int(g.packSize) << 20, CacheDir: g.cacheDir, Logger: g.logger()}
	if g.noCache {
		o.CacheDir = ""
	}
	if o.Keys, err = g.keys(); err != nil {
		return repo.Options{}, err
	}
	return o, nil
}

// keys is where derived keys are kept, nil unless that is asked for.
func (g *globals) keys() (repo.KeyStore, error) {
	if g.keyring == "" || g.keyring == "0" {
		return nil, nil
	}
	kept, err := time.ParseDuration(g.keyring)
	if err != nil {
		return nil, fmt.Errorf("--keyring: %w", err)
	}
	k, err := keyring.New(kept)
	if err != nil {
		return nil, fmt.Errorf("--keyring: %w", err)
	}
	return k, nil
}

// location is where the repository is.
func (g *globals) location() (string, error) {
	switch {
	case g.repo != "":
		return g.repo, nil
	case g.repoFile != "":
		b, err := os.ReadFile(g.repoFile)
		if err != nil {
			return "", fmt.Errorf("read the repository's location: %w", err)
		}
		return strings.TrimSpace(string(b)), nil
	}
	return "", errors.New("no repository is given: use -r or $RESTIC_REPOSITORY")
}

// open opens the repository.
func (g *globals) open(ctx context.Context) (*repo.Repository, error) {
	be, err := g.openBackend(ctx)
	if err != nil {
		return nil, err
	}
	o, err := g.options()
	if err != nil {
		return nil, err
	}
	r, err := repo.OpenWith(ctx, be, func(ctx context.Context) (string, error) { return g.password(ctx, false) }, o)
	if err != nil {
		return nil, err
	}
	g.closers = append(g.closers, r.Close)
	return r, nil
}

func (g *globals) openBackend(ctx context.Context) (backend.Backend, error) {
	loc, err := g.location()
	if err != nil {
		return nil, err
	}
	extended := map[string]string{}
	for _, o := range g.extended {
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			return nil, fmt.Errorf("option -o %q: want key=value", o)
		}
		extended[k] = v
	}
	be, err := location.Open(ctx, loc, location.Options{
		CACert: g.caCert, Extended: extended, Logger: g.logger(),
		Rates: limit.Rates{UploadKiB: g.limitUpload, DownloadKiB: g.limitDownload}, TLSClientCert: g.tlsClientCert, RetryBudget: g.retryBudget,
	})
	if err != nil {
		return nil, err
	}
	g.closers = append(g.closers, be.Close)
	return be, nil
}

// errNoLock refuses --no-lock where it would cost data.
var errNoLock = errors.New("--no-lock is for commands that only read, and for --dry-run")

// openLocked opens the repository for a command that adds to it, and loads its
// index. The context ends when the lock is lost.
func (g *globals) openLocked(ctx context.Context) (*repo.Repository, context.Context, error) {
	if g.noLock {
		return nil, ctx, errNoLock
	}
	return g.openReading(ctx)
}

// openAhead is openLocked for a command that reads for a while before it writes: settled
// returns when it may. Whoever would rather wait for a lock than fail waits before anything
// else.
func (g *globals) openAhead(ctx context.Context) (r *repo.Repository, settled func(context.Context) error, _ context.Context, err error) {
	if g.noLock || g.retryLock > 0 {
		r, ctx, err = g.openLocked(ctx)
		return r, nil, ctx, err
	}
	if r, err = g.open(ctx); err != nil {
		return nil, nil, ctx, err
	}
	lock, err := r.LockAhead(ctx)
	if err != nil {
		return nil, nil, ctx, err
	}
	g.closers = append(g.closers, lock.Unlock)
	ctx = lock.Context()
	return r, lock.Settled, ctx, refusedOr(ctx, lock.Settled, r.LoadIndex(ctx))
}

// refusedOr is err, or that the lock was refused, which is why something failed then.
func refusedOr(ctx context.Context, settled func(context.Context) error, err error) error {
	if err != nil && settled != nil {
		if refused := settled(ctx); errors.Is(refused, repo.ErrLocked) {
			return refused
		}
	}
	return causeOf(ctx, err)
}

// openReading is openLocked for a command that only reads: it can do without a
// lock.
func (g *globals) openReading(ctx context.Context) (*repo.Repository, context.Context, error) {
	r, ctx, err := g.openWithLock(ctx, false)
	if err != nil {
		return nil, ctx, err
	}
	return r, ctx, r.LoadIndex(ctx)
}

// openSalvaging is openReading for a command that makes do with what there is:
// it goes on without the index files that are damaged.
func (g *globals) openSalvaging(ctx context.Context) (*repo.Repository, context.Context, error) {
	r, ctx, err := g.openWithLock(ctx, false)
	if err != nil {
		return nil, ctx, err
	}
	bad, err := r.LoadGoodIndex(ctx)
	for _, why := range bad {
		g.warn(fmt.Errorf("going on without an index file: %w", why))
	}
	return r, ctx, err
}

// openExclusive opens the repository for a command that removes something,
// unless it only tries what it would do. It does not load the index.
func (g *globals) openExclusive(ctx context.Context, dryRun bool) (*repo.Repository, context.Context, error) {
	if g.noLock && !dryRun {
		return nil, ctx, errNoLock
	}
	return g.openWithLock(ctx, true)
}

func (g *globals) openWithLock(ctx context.Context, exclusive bool) (*repo.Repository, context.Context, error) {
	r, err := g.open(ctx)
	if err != nil || g.noLock {
		return r, ctx, err
	}
	lock, err := r.Lock(ctx, exclusive, g.retryLock)
	if err != nil {
		return nil, ctx, err
	}
	g.closers = append(g.closers, lock.Unlock)
	return r, lock.Context(), nil
}

// close lets go of all that was opened, last first.
func (g *globals) close() {
	for i := len(g.closers) - 1; i >= 0; i-- {
		if err := g.closers[i](); err != nil {
			g.warn(err)
		}
	}
	g.closers = nil
}
