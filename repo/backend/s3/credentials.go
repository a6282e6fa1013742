// SPDX-License-Identifier: BSD-2-Clause

package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// metadataTimeout bounds the question to a cloud's metadata service, which on
// other machines may lead nowhere.
const metadataTimeout = 10 * time.Second

// findCredentials takes the first that is there, in restic's order: the
// environment, AWS's credentials file, MinIO's, the machine's IAM role. Unlike
// restic, it takes no others in place of a profile or file that the user named.
// It also returns the key ID in use, for messages.
func findCredentials(ctx context.Context, o Options) (*credentials.Credentials, string, error) {
	if o.Anonymous {
		return credentials.New(&credentials.Static{}), "", nil
	}
	id, secret := os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY")
	switch {
	case id == "" && secret != "":
		return nil, "", permanentf("find S3 credentials: AWS_SECRET_ACCESS_KEY is set, but AWS_ACCESS_KEY_ID is not")
	case id != "" && secret == "":
		return nil, "", permanentf("find S3 credentials: AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not")
	}
	creds := credentials.NewChainCredentials(providers(id != ""))
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	value, err := creds.GetWithContext(&credentials.CredContext{
		Client: &http.Client{Transport: withContext{ctx}},
	})
	if err != nil {
		return nil, "", fmt.Errorf("find S3 credentials: %w", err)
	}
	if value.SignerType.IsAnonymous() {
		return nil, "", noCredentials()
	}
	return creds, value.AccessKeyID, nil
}

func providers(inEnvironment bool) []credentials.Provider {
	p := []credentials.Provider{&credentials.EnvAWS{}}
	if inEnvironment {
		return p
	}
	if named() {
		return append(p, &credentials.FileAWSCredentials{})
	}
	p = append(p, &credentials.EnvMinio{}, &credentials.FileAWSCredentials{}, &credentials.FileMinioClient{})
	// The AWS tools leave the metadata service alone if they are told so.
	if !strings.EqualFold(os.Getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		p = append(p, &credentials.IAM{})
	}
	return p
}

// named says whether the user pointed at a credentials file.
func named() bool {
	return os.Getenv("AWS_PROFILE") != "" || os.Getenv("AWS_SHARED_CREDENTIALS_FILE") != ""
}

// noCredentials says what was looked for, or why what the user named gave
// nothing.
func noCredentials() error {
	profile, file := os.Getenv("AWS_PROFILE"), os.Getenv("AWS_SHARED_CREDENTIALS_FILE")
	if !named() {
		return permanentf("find S3 credentials: none found, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (or -o s3.unsafe-anonymous-auth=true for a public store)")
	}
	_, err := (&credentials.FileAWSCredentials{}).RetrieveWithCredContext(nil)
	if err == nil {
		err = errors.New("there is no key in it")
	}
	return permanentf("find S3 credentials: profile %q (AWS_PROFILE), file %q (AWS_SHARED_CREDENTIALS_FILE): %w", profile, file, err)
}

// withContext bounds requests whose maker takes no context.
type withContext struct{ ctx context.Context }

func (w withContext) RoundTrip(r *http.Request) (*http.Response, error) {
	if w.ctx.Err() != nil {
		return nil, w.ctx.Err()
	}
	return http.DefaultTransport.RoundTrip(r.WithContext(w.ctx))
}

func permanentf(format string, args ...any) error {
	return backend.Permanent(fmt.Errorf(format, args...))
}
