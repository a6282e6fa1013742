// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	// maxDeferred bounds what is held in memory while the cache folder must
	// not be written; what is beyond it is not cached.
	maxDeferred = 64 << 20

	// staleTemp is the age at which a temporary file belongs to no one.
	staleTemp = 24 * time.Hour

	cacheTag = "Signature: 8a477f597d28d172789f06886806bc55\n# This is a cache of dsync-backup, which can be made again.\n"
)

// cache is the repository's folder of local copies. Every file in it can be
// lost, cut short or stale without harm: readers check what they read. So it is
// written without fsync, but under a temporary name first.
type cache struct {
	dir string
	log *slog.Logger

	// gate is read-locked around every change of the folder, so that whoever
	// defers changes knows that none is going on.
	gate     sync.RWMutex
	deferred bool

	mu           sync.Mutex
	pending      map[string][]byte // what to write later; nil: what to remove
	pendingBytes int
}

func openCache(base, repositoryID string, log *slog.Logger) (*cache, error) {
	c := &cache{dir: filepath.Join(base, repositoryID), log: log, pending: map[string][]byte{}}
	if err := os.MkdirAll(c.path("tmp"), 0o700); err != nil {
		return nil, fmt.Errorf("create cache: %w", err)
	}
	// The convention by which backup programs leave caches out.
	tag := filepath.Join(base, "CACHEDIR.TAG")
	if _, err := os.Stat(tag); errors.Is(err, fs.ErrNotExist) {
		if err := os.WriteFile(tag, []byte(cacheTag), 0o600); err != nil {
			return nil, fmt.Errorf("create cache: %w", err)
		}
	}
	c.removeStaleTemps()
	return c, nil
}

func (c *cache) path(name string) string { return filepath.Join(c.dir, filepath.FromSlash(name)) }

func (c *cache) removeStaleTemps() {
	entries, err := os.ReadDir(c.path("tmp"))
	if err != nil {
		return
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > staleTemp {
			_ = os.Remove(c.path("tmp/" + e.Name()))
		}
	}
}

// load reads an entry; the caller checks it, and may change it.
func (c *cache) load(name string) ([]byte, bool) {
	if c == nil {
		return nil, false
	}
	c.mu.Lock()
	data, pending := c.pending[name]
	c.mu.Unlock()
	if pending {
		return append([]byte(nil), data...), data != nil
	}
	data, err := os.ReadFile(c.path(name))
	return data, err == nil
}

// save keeps data under a name. It does not fail: what cannot be cached is
// fetched again.
func (c *cache) save(name string, data []byte) {
	if c == nil {
		return
	}
	written, err := c.writeWith(name, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
	if err != nil {
		c.log.Warn("cannot write to the cache", "error", err)
	} else if !written {
		c.hold(name, append(make([]byte, 0, len(data)), data...))
	}
}

// remove drops an entry.
func (c *cache) remove(name string) {
	if c == nil {
		return
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	if c.deferred {
		c.hold(name, nil)
		return
	}
	if err := os.Remove(c.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("cannot remove a cache entry", "error", err)
	}
}

// hold notes a change for later.
func (c *cache) hold(name string, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pendingBytes -= len(c.pending[name])
	delete(c.pending, name)
	if c.pendingBytes+len(data) > maxDeferred {
		// What was there under this name is good or noticed as bad: let it be.
		return
	}
	c.pending[name] = data
	c.pendingBytes += len(data)
}

func (c *cache) isDeferred() bool {
	c.gate.RLock()
	defer c.gate.RUnlock()
	return c.deferred
}

func (c *cache) setDeferred(on bool) {
	c.gate.Lock()
	c.deferred = on
	c.gate.Unlock()
	if on {
		return
	}
	c.mu.Lock()
	pending := c.pending
	c.pending, c.pendingBytes = map[string][]byte{}, 0
	c.mu.Unlock()
	for name, data := range pending {
		if data == nil {
			c.remove(name)
		} else {
			c.save(name, data)
		}
	}
}

// writeWith makes an entry that fill writes, complete or not at all. It does
// nothing, and says so, while changes are deferred.
func (c *cache) writeWith(name string, fill func(*os.File) error) (written bool, err error) {
	c.gate.RLock()
	defer c.gate.RUnlock()
	if c.deferred {
		return false, nil
	}
	f, err := os.CreateTemp(c.path("tmp"), "new-*")
	if err != nil {
		return false, err
	}
	err = errors.Join(fill(f), f.Close())
	if err == nil {
		err = os.MkdirAll(filepath.Dir(c.path(name)), 0o700)
	}
	if err == nil {
		err = os.Rename(f.Name(), c.path(name))
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err == nil, err
}

// list names the entries of one folder of the cache.
func (c *cache) list(folder string) []string {
	if c == nil {
		return nil
	}
	entries, err := os.ReadDir(c.path(folder))
	if err != nil {
		return nil
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// scratchFile is a file for work, which has no name and goes when it is closed;
// nil while changes are deferred.
func (c *cache) scratchFile() (*os.File, error) {
	c.gate.RLock()
	defer c.gate.RUnlock()
	if c.deferred {
		return nil, nil
	}
	f, err := os.CreateTemp(c.path("tmp"), "work-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
