// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/minio/minio-go/v7"
)

// callerError is what the caller's own fn returned: nothing to explain.
type callerError struct{ err error }

func (e callerError) Error() string { return e.err.Error() }
func (e callerError) Unwrap() error { return e.err }

func consumed(err error) error {
	if err == nil {
		return nil
	}
	return callerError{err}
}

// explain turns an error of the S3 client into one line that says what to do,
// and marks what cannot be mended by trying again.
func (b *Backend) explain(t backend.FileType, err error) error {
	if errors.As(err, new(callerError)) || errors.Is(err, backend.ErrPermanent) {
		return err
	}
	var resp minio.ErrorResponse
	if errors.As(err, &resp) {
		return b.explainResponse(t, resp)
	}
	if ue := (*url.Error)(nil); errors.As(err, &ue) {
		err = ue.Err // it repeats the URL
	}
	return b.explainNetwork(err)
}

func (b *Backend) explainResponse(t backend.FileType, e minio.ErrorResponse) error {
	host, bucket := b.loc.Host, b.loc.Bucket
	if unexplained(e) {
		return fmt.Errorf("the answer 404 without a reason is not one of an S3 server: a proxy's before %s, or another server's", host)
	}
	switch e.Code {
	case minio.NoSuchKey:
		return backend.ErrNotExist
	case minio.NoSuchBucket:
		return backend.NoStore(t, fmt.Sprintf("bucket %q does not exist at %s, check the name (init creates it)", bucket, host))
	case "InvalidAccessKeyId":
		return permanentf("access key ID %q is not known at %s, check AWS_ACCESS_KEY_ID", b.keyID, host)
	case minio.SignatureDoesNotMatch:
		return permanentf("the secret key for access key ID %q is wrong, check AWS_SECRET_ACCESS_KEY", b.keyID)
	case "ExpiredToken", "ExpiredTokenException", "InvalidToken", "InvalidTokenId":
		return permanentf("the session token for access key ID %q is not valid or has expired, get a new one (AWS_SESSION_TOKEN)", b.keyID)
	case minio.RequestTimeTooSkewed:
		return b.skewed()
	case minio.AccessDenied, minio.AllAccessDisabled, "AccessForbidden":
		who := fmt.Sprintf("access key ID %q is", b.keyID)
		if b.opts.Anonymous {
			who = "unsigned requests are"
		}
		return permanentf("%s not allowed to do this with bucket %q, check its policy: %s", who, bucket, oneLine(e.Message))
	case minio.InvalidBucketName:
		return permanentf("%q is not a valid bucket name", bucket)
	case "InvalidRegion", minio.AuthorizationHeaderMalformed, "PermanentRedirect", "IllegalLocationConstraintException":
		return permanentf("the region is wrong, set -o s3.region or AWS_DEFAULT_REGION: %s", oneLine(e.Message))
	case "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage":
		return permanentf("the store is full, make room and try again: %s", oneLine(e.Message))
	case minio.InvalidObjectState:
		return permanentf("the object lies in an archive (storage class), restore it there first: %s", oneLine(e.Message))
	}
	err := fmt.Errorf("%s (%s)", oneLine(e.Error()), e.Code)
	// MinIO says so if it finds out in mid-write.
	if e.StatusCode == http.StatusInsufficientStorage || strings.Contains(e.Message, "no space left on device") {
		return permanentf("the store is full, make room and try again: %w", err)
	}
	// So say Go's servers and nginx.
	if strings.Contains(e.Message, "HTTPS server") || strings.Contains(e.Message, "HTTPS port") {
		return permanentf("%s speaks TLS, write s3:https://%s/…", host, host)
	}
	if !passes(e) {
		return backend.Permanent(err)
	}
	return err
}

// passes says that the same request may be answered otherwise next time.
func passes(e minio.ErrorResponse) bool {
	switch e.StatusCode {
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusTooEarly, http.StatusTooManyRequests,
		499: // the connection broke, as nginx and MinIO say it
		return true
	case http.StatusMovedPermanently, http.StatusPermanentRedirect, http.StatusNotImplemented:
		return false
	}
	switch e.Code {
	case "RequestTimeout", minio.IncompleteBody, minio.BadDigest, // damaged or cut off on the way
		"XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
		"ThrottlingException", "Throttling", "KMS.ThrottlingException": // Amazon's of the keys service comes with status 400
		return true
	}
	return e.StatusCode < 400 || e.StatusCode >= 500
}

// unexplained tells a 404 that may be anybody's, a load balancer's that has lost
// its servers, from one of S3, which has the reason in its body. The client makes
// up a missing key or bucket for it.
func unexplained(e minio.ErrorResponse) bool {
	return e.StatusCode == http.StatusNotFound && e.XMLName.Local == ""
}

func (b *Backend) skewed() error {
	ahead, direction := time.Duration(b.ahead.Load()), "ahead of"
	if ahead < 0 {
		ahead, direction = -ahead, "behind"
	}
	if ahead < time.Minute {
		return permanentf("the clock of this machine and that of %s differ by too much, set it right", b.loc.Host)
	}
	return permanentf("the clock of this machine is %s %s that of %s, set it right", ahead.Round(time.Second), direction, b.loc.Host)
}

func (b *Backend) explainNetwork(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return permanentf("the certificate of %s is signed by an unknown authority, name its certificate with --cacert: %w", b.loc.Host, err)
	case errors.As(err, new(*tls.CertificateVerificationError)):
		return permanentf("the certificate of %s cannot be trusted: %w", b.loc.Host, err)
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return permanentf("%s does not speak TLS, write s3:http://%s/…", b.loc.Host, b.loc.Host)
	}
	if oe := (*net.OpError)(nil); errors.As(err, &oe) && oe.Op == "dial" {
		err = oe.Err
		if se := (*os.SyscallError)(nil); errors.As(err, &se) {
			err = se.Err
		}
		return fmt.Errorf("connect to %s: %w", b.loc.Host, err)
	}
	return err
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
