// SPDX-License-Identifier: BSD-2-Clause

// Package location opens a store by the name that the user gives it, as restic
// names it: a path, local:path, or s3:….
//
// It promises that messages show no part of a location that may hold a secret,
// and that an option it does not know is refused. It knows nothing of the
// cache, which stands above.
package location

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/limit"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/repo/backend/retry"
	"github.com/dsync-backup/dsync-backup/repo/backend/s3"
)

// supported is for messages.
const supported = "supported are a path and s3:https://host/bucket/prefix"

// Location names a store: a directory, or a place in a bucket.
type Location struct {
	Path string       // of a directory, absolute; "" for S3
	S3   *s3.Location // nil for a directory
}

// String is the location without secrets.
func (l Location) String() string {
	if l.S3 != nil {
		return l.S3.String()
	}
	return l.Path
}

// Parse reads a location. What begins with a name and a colon is a scheme; a
// path with a colon in it must begin with "/", "./", "../" or "local:".
func Parse(s string) (Location, error) {
	if s == "" {
		return Location{}, errors.New("parse repository location: it is empty (set -r or RESTIC_REPOSITORY)")
	}
	scheme, rest, found := strings.Cut(s, ":")
	isPath := !found || strings.HasPrefix(s, "/") || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../")
	switch {
	case isPath:
		return parsePath(s)
	case scheme == "local" && rest != "":
		return parsePath(rest)
	case scheme == "local":
		return Location{}, errors.New("parse repository location: no path behind local:")
	case scheme == "s3":
		l, err := s3.ParseLocation(s)
		if err != nil {
			return Location{}, err
		}
		return Location{S3: &l}, nil
	case slices.Contains([]string{"sftp", "rest", "b2", "azure", "gs", "swift", "rclone"}, scheme):
		return Location{}, fmt.Errorf("parse repository location: restic's %s: is not supported, %s", scheme, supported)
	}
	// Not even the scheme is repeated: who leaves out s3: may begin with a key.
	return Location{}, fmt.Errorf("parse repository location: what is before the colon is no known scheme, %s (write local:… if it is a path)", supported)
}

func parsePath(p string) (Location, error) {
	abs, err := filepath.Abs(p)
	if err != nil {
		return Location{}, fmt.Errorf("parse repository location: %w", err)
	}
	return Location{Path: abs}, nil
}

// Options say how to open a store; the zero value is usable.
type Options struct {
	CACert        string // file of PEM certificates trusted instead of the system's
	TLSClientCert string // file with a PEM certificate and its private key

	// Extended are the user's -o key=value, as s3.region=…
	Extended map[string]string

	Rates       limit.Rates
	RetryBudget time.Duration // see retry.Options
	Logger      *slog.Logger  // told of retries; nil: nobody
}

// Open parses a location and opens it, with retries and limits. It does not
// contact the store.
func Open(ctx context.Context, location string, o Options) (backend.Backend, error) {
	l, err := Parse(location)
	if err != nil {
		return nil, backend.Permanent(err)
	}
	localOptions, s3Options, err := o.extended()
	if err != nil {
		return nil, backend.Permanent(err)
	}
	limiter := limit.NewLimiter(o.Rates)
	var be backend.Backend
	if l.S3 != nil {
		s3Options.Wrap = limiter.Transport
		be, err = s3.Open(ctx, *l.S3, s3Options)
	} else {
		be, err = local.Open(l.Path, localOptions)
		if err == nil && o.Rates != (limit.Rates{}) {
			be = limit.New(be, limiter)
		}
	}
	if err != nil {
		return nil, err
	}
	return retry.New(be, retry.Options{Budget: o.RetryBudget, Logger: o.Logger}), nil
}

// extended sorts the user's options by the store that they are for. All are
// checked, also those for the store that is not opened.
func (o Options) extended() (local.Options, s3.Options, error) {
	l, s := local.Options{}, s3.Options{CACert: o.CACert, TLSClientCert: o.TLSClientCert}
	for _, key := range slices.Sorted(maps.Keys(o.Extended)) {
		value := o.Extended[key]
		store, name, _ := strings.Cut(key, ".")
		_, known := s3.OptionNames[name]
		switch {
		case store == "s3" && known:
			if err := s.Set(name, value); err != nil {
				return l, s, err
			}
		case key == "local.connections":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 {
				return l, s, fmt.Errorf("set option %s: %q is not a positive number", key, value)
			}
			l.Connections = n
		default:
			return l, s, fmt.Errorf("set option %q: there is no such option, there are %s", key, strings.Join(OptionNames(), ", "))
		}
	}
	return l, s, nil
}

// OptionNames lists the keys that Extended may have.
func OptionNames() []string {
	names := []string{"local.connections"}
	for name := range s3.OptionNames {
		names = append(names, "s3."+name)
	}
	slices.Sort(names)
	return names
}
