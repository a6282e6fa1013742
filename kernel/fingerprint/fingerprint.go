// SPDX-License-Identifier: BSD-2-Clause

package fingerprint

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// ErrNoProof says that writes to the device could go unseen, or that it is in
// use. The text that wraps it gives the reason in one line.
var ErrNoProof = errors.New("a write to the device could go unseen")

// ErrChanged says that the device was written to, or is another one.
var ErrChanged = errors.New("the device is not as it was when its tracking was saved")

// version changes with whatever goes into a digest.
const version = 1

// Digest is a keyed SHA-256; its text is hexadecimal.
type Digest [32]byte

// Key is drawn for each saved state: it chooses the sample, and keys the digests.
type Key [32]byte

// NewKey draws a key.
func NewKey() (k Key) {
	rand.Read(k[:]) // never fails
	return k
}

// Part is a range of the device with a witness: bytes that change whenever
// somebody writes to the range in an ordinary way.
type Part struct {
	Offset int64  `json:"offset"` // in bytes
	Length int64  `json:"length"` // in bytes
	Kind   string `json:"kind"`   // "ext4", "xfs"; "gpt", "mbr": what lies outside of its partitions; "data": hashed whole
	ID     string `json:"id,omitempty"`
	Digest Digest `json:"digest"`
}

func (p Part) String() string {
	switch p.Kind {
	case "gpt", "mbr":
		return fmt.Sprintf("the %s partition table at byte %d", p.Kind, p.Offset)
	case "data":
		return fmt.Sprintf("the %d bytes at byte %d", p.Length, p.Offset)
	}
	return fmt.Sprintf("the %s at byte %d", p.Kind, p.Offset)
}

// Fingerprint is what a device looked like.
type Fingerprint struct {
	Version int    `json:"version"`
	Size    int64  `json:"size"` // of the device in bytes
	Key     Key    `json:"key"`
	Parts   []Part `json:"parts"`  // in the order of the device; together they are all of it
	Sample  Digest `json:"sample"` // of blocks anywhere
	// Doubt is why the fingerprint proves nothing, "" if it does. With a
	// doubt there are no parts and no sample.
	Doubt string `json:"doubt,omitempty"`
}

// Take looks at a device of size bytes, of which nobody else may write any byte
// meanwhile: the caller holds it exclusively. It reads at most 256 MiB, usually
// some 10 MiB, and writes nothing. To compare, take the second one with the key
// of the first. Only a device that cannot be read is an error; one that cannot
// be vouched for gets a fingerprint with a Doubt.
func Take(ctx context.Context, src Source, size int64, key Key) (Fingerprint, error) {
	f := Fingerprint{Version: version, Size: size, Key: key}
	parts, err := layout(ctx, src, size)
	var d doubt
	if errors.As(err, &d) {
		f.Doubt = d.reason
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("take fingerprint: %w", err)
	}
	for _, p := range parts {
		if p.Digest, err = digest(ctx, src, key, p); err != nil {
			return f, fmt.Errorf("take fingerprint: %w", err)
		}
		f.Parts = append(f.Parts, p.Part)
	}
	if f.Sample, err = sample(ctx, src, size, key); err != nil {
		return f, fmt.Errorf("take fingerprint: %w", err)
	}
	return f, nil
}

// Proof is nil if the fingerprint proves something, else an [ErrNoProof] with
// the reason.
func (f Fingerprint) Proof() error {
	switch {
	case f.Doubt != "":
		return fmt.Errorf("%w: %s", ErrNoProof, f.Doubt)
	case f.Version != version:
		return fmt.Errorf("%w: fingerprint version %d is not known", ErrNoProof, f.Version)
	case len(f.Parts) == 0:
		return fmt.Errorf("%w: the device is empty", ErrNoProof)
	}
	return nil
}

// Compare is nil if both fingerprints prove that nobody wrote to the device
// between them, f being the older. An [ErrChanged] says what differs, an
// [ErrNoProof] what cannot be known.
func (f Fingerprint) Compare(now Fingerprint) error {
	if err := f.Proof(); err != nil {
		return err
	}
	if f.Size != now.Size {
		return changed("it had %d bytes and has %d", f.Size, now.Size)
	}
	if err := now.Proof(); err != nil {
		return err
	}
	if f.Key != now.Key {
		return fmt.Errorf("%w: the fingerprints have different keys", ErrNoProof)
	}
	if !f.resembles(now) {
		return changed("other partitions or file systems are on it")
	}
	for i, p := range f.Parts {
		if p.Digest != now.Parts[i].Digest {
			return changed("%s was used or changed", p)
		}
	}
	if f.Sample != now.Sample {
		return changed("blocks of a sample were written past the file systems on it")
	}
	return nil
}

func changed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrChanged}, args...)...)
}

// resembles reports whether both have the same parts, as far as their place,
// kind and identifier go.
func (f Fingerprint) resembles(g Fingerprint) bool {
	return f.Size == g.Size && slices.EqualFunc(f.Parts, g.Parts, func(a, b Part) bool {
		a.Digest, b.Digest = Digest{}, Digest{}
		return a == b
	})
}

// digest covers what a part is and the bytes of its spans.
func digest(ctx context.Context, src Source, key Key, p witnessed) (d Digest, err error) {
	h := hmac.New(sha256.New, key[:])
	fmt.Fprintf(h, "%d %s %q %d %d\n", version, p.Kind, p.ID, p.Offset, p.Length)
	buf := make([]byte, 1<<20)
	for _, s := range p.spans {
		var at [16]byte
		binary.LittleEndian.PutUint64(at[:], uint64(s.off))
		binary.LittleEndian.PutUint64(at[8:], uint64(s.len))
		h.Write(at[:])
		for off := s.off; off < s.end(); off += int64(len(buf)) {
			b := buf[:min(int64(len(buf)), s.end()-off)]
			if err := src.ReadExtent(ctx, b, off); err != nil {
				return d, err
			}
			h.Write(b)
		}
	}
	return Digest(h.Sum(nil)), nil
}

// MarshalText writes hexadecimal digits.
func (d Digest) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, d[:]), nil }

// UnmarshalText reads what MarshalText wrote.
func (d *Digest) UnmarshalText(b []byte) error { return unhex((*[32]byte)(d), b) }

// MarshalText writes hexadecimal digits.
func (k Key) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, k[:]), nil }

// UnmarshalText reads what MarshalText wrote.
func (k *Key) UnmarshalText(b []byte) error { return unhex((*[32]byte)(k), b) }

func unhex(dst *[32]byte, b []byte) error {
	if len(b) != 64 {
		return fmt.Errorf("%d digits instead of 64", len(b))
	}
	_, err := hex.Decode(dst[:], b)
	return err
}
