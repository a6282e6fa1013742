// SPDX-License-Identifier: BSD-2-Clause

package crypto

import (
	"crypto/rand"
	"fmt"
	"math/bits"
	"time"

	"golang.org/x/crypto/scrypt"
)

// SaltSize is the length of a key file's salt, in bytes; restic accepts no
// other.
const SaltSize = 64

// maxKDFMemory bounds what a key file, which anyone with access to the store
// can write, makes us allocate: 128·N·r bytes.
const maxKDFMemory = 1 << 31

// Params are scrypt's cost parameters.
type Params struct {
	N, R, P int
}

// Validate reports parameters that scrypt does not define or that would take
// more than 2 GiB.
func (p Params) Validate() error {
	if p.N <= 1 || bits.OnesCount(uint(p.N)) != 1 || p.R < 1 || p.P < 1 ||
		p.R >= 1<<30 || p.P >= 1<<30 || uint64(p.R)*uint64(p.P) >= 1<<30 {
		return fmt.Errorf("scrypt parameters N=%d r=%d p=%d are not valid", p.N, p.R, p.P)
	}
	if uint64(p.N) > maxKDFMemory/128/uint64(p.R) {
		return fmt.Errorf("scrypt parameters N=%d r=%d need more than 2 GiB of memory", p.N, p.R)
	}
	return nil
}

// NewSalt draws a salt.
func NewSalt() []byte {
	salt := make([]byte, SaltSize)
	_, _ = rand.Read(salt)
	return salt
}

// Derive makes the key that password and salt stand for.
func Derive(p Params, salt []byte, password string) (*Key, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if len(salt) != SaltSize {
		return nil, fmt.Errorf("derive key: the salt has %d bytes, want %d", len(salt), SaltSize)
	}
	raw, err := scrypt.Key([]byte(password), salt, p.N, p.R, p.P, 64)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	return keyFromBytes(raw), nil
}

// Calibrate chooses parameters that take 32 MiB and about d of this machine's
// time, and never fewer than N=32768, r=8, p=1.
func Calibrate(d time.Duration) (Params, error) {
	p := Params{N: 1 << 15, R: 8, P: 1}
	start := time.Now()
	if _, err := Derive(p, NewSalt(), "calibration"); err != nil {
		return Params{}, err
	}
	// scrypt runs its p mixing passes one after the other.
	p.P = max(1, min(64, int(d/max(time.Since(start), time.Millisecond))))
	return p, nil
}
