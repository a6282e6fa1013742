// SPDX-License-Identifier: BSD-2-Clause

// Package crypto seals and opens what a restic repository stores: AES-256 in
// counter mode, authenticated with Poly1305-AES, under keys that scrypt
// derives from a password or that a random source made.
//
// It promises that Open returns nothing that was not sealed with the same key.
// It knows nothing of blobs, packs or files. The format is the one of restic's
// design document, sections "Repository Format" and "Keys, Encryption and MAC";
// Poly1305-AES is Bernstein's "The Poly1305-AES message-authentication code".
package crypto

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	// The package is deprecated for new designs; this format is an old one.
	"golang.org/x/crypto/poly1305" //nolint:staticcheck // SA1019: the repository format prescribes Poly1305-AES
)

const (
	ivSize  = aes.BlockSize
	macSize = poly1305.TagSize

	// Overhead is how many bytes longer a sealed text is than its plaintext.
	Overhead = ivSize + macSize
)

// ErrUnauthenticated says that a sealed text was changed, cut, or made with
// another key.
var ErrUnauthenticated = errors.New("authentication failed: the data is damaged or the key is another one")

// Key encrypts and authenticates. It is safe for concurrent use.
type Key struct {
	encrypt  [32]byte
	macK     [16]byte // the AES-128 key that turns the IV into Poly1305's s
	macR     [16]byte
	block    cipher.Block
	macBlock cipher.Block
}

// NewKey draws a random key.
func NewKey() *Key {
	var raw [64]byte
	// crypto/rand.Read never fails since Go 1.24: it aborts the process.
	_, _ = rand.Read(raw[:])
	return keyFromBytes(raw[:])
}

// keyFromBytes splits 64 bytes as scrypt's output is split: 32 for AES-256,
// 16 for the MAC's k, 16 for its r.
func keyFromBytes(raw []byte) *Key {
	k := &Key{}
	copy(k.encrypt[:], raw[:32])
	copy(k.macK[:], raw[32:48])
	copy(k.macR[:], raw[48:64])
	k.expand()
	return k
}

func (k *Key) expand() {
	// NewCipher fails only for a key length that is not 16, 24 or 32.
	k.block, _ = aes.NewCipher(k.encrypt[:])
	k.macBlock, _ = aes.NewCipher(k.macK[:])
}

// oneTimeKey is Poly1305's key for the text with that IV: r, then AES_k(iv).
func (k *Key) oneTimeKey(iv []byte) (key [32]byte) {
	copy(key[:16], k.macR[:])
	k.macBlock.Encrypt(key[16:], iv)
	return key
}

// Seal appends IV, ciphertext and MAC of plaintext to dst, under a fresh
// random IV. dst and plaintext must not overlap.
func (k *Key) Seal(dst, plaintext []byte) []byte {
	start := len(dst)
	dst = append(dst, make([]byte, ivSize)...)
	iv := dst[start : start+ivSize]
	_, _ = rand.Read(iv)
	return k.sealWith(dst, start, plaintext)
}

func (k *Key) sealWith(dst []byte, start int, plaintext []byte) []byte {
	body := start + ivSize
	dst = slices.Grow(dst, len(plaintext)+macSize)[:body+len(plaintext)]
	iv, text := dst[start:body], dst[body:]
	cipher.NewCTR(k.block, iv).XORKeyStream(text, plaintext)
	var mac [macSize]byte
	key := k.oneTimeKey(iv)
	poly1305.Sum(&mac, text, &key)
	return append(dst, mac[:]...)
}

// Open checks sealed and appends its plaintext to dst, which must not overlap
// it. The error is [ErrUnauthenticated].
func (k *Key) Open(dst, sealed []byte) ([]byte, error) {
	if err := k.verify(sealed); err != nil {
		return nil, err
	}
	start, text := len(dst), sealed[ivSize:len(sealed)-macSize]
	dst = slices.Grow(dst, len(text))[:start+len(text)]
	cipher.NewCTR(k.block, sealed[:ivSize]).XORKeyStream(dst[start:], text)
	return dst, nil
}

// OpenInPlace checks sealed and decrypts it where it lies; the plaintext is a
// part of sealed. On error sealed is unchanged.
func (k *Key) OpenInPlace(sealed []byte) ([]byte, error) {
	if err := k.verify(sealed); err != nil {
		return nil, err
	}
	text := sealed[ivSize : len(sealed)-macSize]
	cipher.NewCTR(k.block, sealed[:ivSize]).XORKeyStream(text, text)
	return text, nil
}

func (k *Key) verify(sealed []byte) error {
	if len(sealed) < Overhead {
		return fmt.Errorf("%d bytes are too short to be sealed: %w", len(sealed), ErrUnauthenticated)
	}
	var mac [macSize]byte
	copy(mac[:], sealed[len(sealed)-macSize:])
	key := k.oneTimeKey(sealed[:ivSize])
	if !poly1305.Verify(&mac, sealed[ivSize:len(sealed)-macSize], &key) {
		return ErrUnauthenticated
	}
	return nil
}

// keyJSON is the form in which a key file holds the master key.
type keyJSON struct {
	MAC struct {
		K []byte `json:"k"`
		R []byte `json:"r"`
	} `json:"mac"`
	Encrypt []byte `json:"encrypt"`
}

// MarshalJSON writes the key itself, in the clear.
func (k *Key) MarshalJSON() ([]byte, error) {
	var j keyJSON
	j.MAC.K, j.MAC.R, j.Encrypt = k.macK[:], k.macR[:], k.encrypt[:]
	return json.Marshal(j)
}

// UnmarshalJSON reads a key; one of a wrong length or all zeros is an error.
func (k *Key) UnmarshalJSON(data []byte) error {
	var j keyJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return fmt.Errorf("decode master key: %w", err)
	}
	if len(j.MAC.K) != 16 || len(j.MAC.R) != 16 || len(j.Encrypt) != 32 ||
		allZero(j.MAC.K) || allZero(j.MAC.R) || allZero(j.Encrypt) {
		return errors.New("decode master key: not a valid key")
	}
	copy(k.encrypt[:], j.Encrypt)
	copy(k.macK[:], j.MAC.K)
	copy(k.macR[:], j.MAC.R)
	k.expand()
	return nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
