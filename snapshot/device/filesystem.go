// SPDX-License-Identifier: BSD-2-Clause

package device

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is the kernel's own limit on symbolic links in a path.
const maxLinks = 40

// OnFileSystem says which file system a path lies on, or would lie on once it
// is created: symbolic links are followed, also those that lead nowhere yet.
func OnFileSystem(path string) (Mount, error) {
	return host().onFileSystem(path)
}

func (s system) onFileSystem(path string) (Mount, error) {
	existing, err := nearest(path)
	if err != nil {
		return Mount{}, err
	}
	id, err := mountID(unix.AT_FDCWD, existing, 0)
	if err != nil {
		return Mount{}, err
	}
	entries, err := s.mountsOf("self", map[string]bool{})
	if err != nil {
		return Mount{}, fmt.Errorf("find file system of %s: %w", path, err)
	}
	for _, e := range entries {
		if e.id != id {
			continue
		}
		m := superblocks(entries)[e.num]
		s.reach(m)
		return *m, nil
	}
	return Mount{}, fmt.Errorf("find file system of %s: mount %d is not listed", path, id)
}

// LiesOn reports which of mounts, if any, a write to path would reach: the
// file system of the path itself, or for an overlay the one that its upper
// directory lies on. Loop devices need no such care, because [Mounts] lists
// what is stacked above too. An overlay whose upper directory cannot be found
// from here is an error.
func LiesOn(path string, mounts []Mount) (on Mount, ok bool, err error) {
	for range maxLinks {
		m, err := OnFileSystem(path)
		if err != nil {
			return Mount{}, false, err
		}
		for _, have := range mounts {
			if have.Dev == m.Dev {
				return have, true, nil
			}
		}
		if m.Type != "overlay" || m.ReadOnly {
			return Mount{}, false, nil
		}
		upper := overlayUpper(m.options)
		if _, err := os.Stat(upper); err != nil {
			return Mount{}, false, fmt.Errorf("find the file system below the overlay at %s: its upper directory %q is out of sight", m.Path, upper)
		}
		path = upper
	}
	return Mount{}, false, fmt.Errorf("find file system of %s: too many overlays", path)
}

func overlayUpper(options string) string {
	for _, o := range strings.Split(options, ",") {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return unescape(dir)
		}
	}
	return ""
}

// nearest is the path itself, or the deepest directory on the way to it that
// exists.
func nearest(path string) (string, error) {
	p, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("find file system of %s: %w", path, err)
	}
	for links := 0; ; {
		_, err := os.Stat(p)
		if err == nil {
			return p, nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return "", fmt.Errorf("find file system of %s: %w", path, err)
		}
		target, err := os.Readlink(p)
		if err != nil {
			p = filepath.Dir(p)
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("find file system of %s: %w", path, unix.ELOOP)
		}
		if !filepath.IsAbs(target) {
			// The directory's own links are resolved before "..".
			dir, err := filepath.EvalSymlinks(filepath.Dir(p))
			if err != nil {
				return "", fmt.Errorf("find file system of %s: %w", path, err)
			}
			target = filepath.Join(dir, target)
		}
		p = target
	}
}
