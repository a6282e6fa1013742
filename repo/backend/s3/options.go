// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/minio/minio-go/v7"
)

// DefaultConnections is the number of calls in flight, as in restic.
const DefaultConnections = 5

// Options of an S3 store; the zero value is usable.
type Options struct {
	Region       string // "": AWS_DEFAULT_REGION, or asked from the server
	BucketLookup string // "auto" (also ""), "dns" (bucket.host) or "path" (host/bucket)
	StorageClass string // of new objects; an archive class is for packs only
	Connections  int    // 0: DefaultConnections
	ListV1       bool   // list with the first version of the call
	Anonymous    bool   // do not sign requests

	CACert        string // file of PEM certificates that are trusted instead of the system's
	TLSClientCert string // file with a PEM certificate and its private key

	// Wrap may put a layer around the HTTP transport (a rate limit, say).
	Wrap func(http.RoundTripper) http.RoundTripper
}

// OptionNames are the names that [Options.Set] knows, each with what it is for.
var OptionNames = map[string]string{
	"region":                "the region of the bucket",
	"bucket-lookup":         "auto, dns or path",
	"storage-class":         "the storage class of new objects",
	"connections":           "the number of connections",
	"list-objects-v1":       "true: list with the deprecated first version of the call",
	"unsafe-anonymous-auth": "true: send requests without a signature",
}

// Set sets the option that the user calls s3.name.
func (o *Options) Set(name, value string) (err error) {
	switch name {
	case "region":
		o.Region = value
	case "bucket-lookup":
		o.BucketLookup = value
		_, err = o.lookup()
	case "storage-class":
		o.StorageClass = value
	case "connections":
		o.Connections, err = strconv.Atoi(value)
		if err != nil || o.Connections < 1 {
			err = fmt.Errorf("%q is not a positive number", value)
		}
	case "list-objects-v1":
		o.ListV1, err = parseBool(value)
	case "unsafe-anonymous-auth":
		o.Anonymous, err = parseBool(value)
	default:
		err = fmt.Errorf("there is no such option")
	}
	if err != nil {
		return fmt.Errorf("set option s3.%s: %w", name, err)
	}
	return nil
}

func parseBool(s string) (bool, error) {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("%q is neither true nor false", s)
	}
	return v, nil
}

func (o *Options) lookup() (minio.BucketLookupType, error) {
	switch strings.ToLower(o.BucketLookup) {
	case "", "auto":
		return minio.BucketLookupAuto, nil
	case "dns":
		return minio.BucketLookupDNS, nil
	case "path":
		return minio.BucketLookupPath, nil
	}
	return 0, fmt.Errorf("%q is none of auto, dns, path", o.BucketLookup)
}
