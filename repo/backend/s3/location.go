// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"
)

// Location says where in which bucket of which host a repository lies.
type Location struct {
	Host   string // with the port, if any
	HTTP   bool   // without TLS
	Bucket string
	Prefix string // of all keys, without a slash at the end; may be empty
}

// ParseLocation reads what restic reads:
//
//	s3:https://host[:port]/bucket[/prefix]    (or http)
//	s3:host[:port]/bucket[/prefix]            (https)
//	s3://host[:port]/bucket[/prefix]          (https)
//
// Keys and secrets have no place in a location: it is shown in messages.
// Errors do not repeat it.
func ParseLocation(s string) (Location, error) {
	rest, ok := strings.CutPrefix(s, "s3:")
	if !ok {
		return Location{}, errors.New("parse S3 location: it does not begin with s3:")
	}
	var l Location
	if strings.HasPrefix(rest, "http://") || strings.HasPrefix(rest, "https://") {
		u, err := url.Parse(rest)
		if err != nil {
			return Location{}, errors.New("parse S3 location: not a valid URL behind s3:")
		}
		if u.RawQuery != "" || u.Fragment != "" {
			return Location{}, errors.New("parse S3 location: a URL with ? or # is not a location")
		}
		l.HTTP = u.Scheme == "http"
		rest = u.Host + u.Path
		if u.User != nil {
			rest = "@" + rest
		}
	} else {
		rest = strings.TrimPrefix(rest, "//")
	}
	l.Host, rest, _ = strings.Cut(rest, "/")
	l.Bucket, l.Prefix, _ = strings.Cut(rest, "/")
	if l.Prefix != "" {
		l.Prefix = path.Clean(l.Prefix)
	}
	return l, l.validate()
}

func (l Location) validate() error {
	switch {
	case strings.Contains(l.Host, "@"):
		return errors.New("parse S3 location: keys do not belong into the location, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
	case l.Host == "":
		return errors.New("parse S3 location: no host, want s3:https://host/bucket/prefix")
	case l.Bucket == "":
		return errors.New("parse S3 location: no bucket, want s3:https://host/bucket/prefix")
	case l.Prefix == "..", strings.HasPrefix(l.Prefix, "../"):
		return fmt.Errorf("parse S3 location: prefix %q leads out of the bucket", l.Prefix)
	}
	return nil
}

// String is the location in its full form.
func (l Location) String() string {
	scheme := "https"
	if l.HTTP {
		scheme = "http"
	}
	s := "s3:" + scheme + "://" + l.Host + "/" + l.Bucket
	if l.Prefix != "" {
		s += "/" + l.Prefix
	}
	return s
}

// key is the object key of a path within the repository.
func (l Location) key(p string) string { return path.Join(l.Prefix, p) }
