// SPDX-License-Identifier: BSD-2-Clause

package resume

import (
	"context"

	"github.com/dsync-backup/dsync-backup/kernel/fingerprint"
)

// Device is an open device, as snapshot/device has them.
type Device interface {
	fingerprint.Source
	Size() int64
	Path() string
	Close() error
}

// Devices opens devices, and knows them again.
type Devices interface {
	// Open opens a device. An exclusive one stays claimed until it is closed,
	// so that nobody mounts it or builds upon it.
	Open(path string, exclusive bool) (Device, error)
	// Identify tells what stays the same over a reboot of the device at a path.
	Identify(ctx context.Context, path string) (fingerprint.Identity, error)
}
