// SPDX-License-Identifier: BSD-2-Clause

package crypto

import (
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"golang.org/x/crypto/poly1305" //nolint:staticcheck // SA1019: the format prescribes it
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The vectors of Bernstein's paper "The Poly1305-AES message-authentication
// code", appendix B.
func TestMACMatchesBernsteinsVectors(t *testing.T) {
	for _, v := range []struct{ message, r, k, nonce, mac string }{
		{"f3f6", "851fc40c3467ac0be05cc20404f3f700", "ec074c835580741701425b623235add6", "fb447350c4e868c52ac3275cf9d4327e", "f4c633c3044fc145f84f335cb81953de"},
		{"", "a0f3080000f46400d0c7e9076c834403", "75deaa25c09f208e1dc4ce6b5cad3fbf", "61ee09218d29b0aaed7e154a2c5509cc", "dd3fab2251f11ac759f0887129cc2ee7"},
		{"663cea190ffb83d89593f3f476b6bc24d7e679107ea26adb8caf6652d0656136", "48443d0bb0d21109c89a100b5ce2c208", "6acb5f61a7176dd320c5c1eb2edcdc74", "ae212a55399729595dea458bc621ff0e", "0ee1c16bb73f0f4fd19881753c01cdbe"},
		{"ab0812724a7f1e342742cbed374d94d136c6b8795d45b3819830f2c04491faf0990c62e48b8018b2c3e4a0fa3134cb67fa83e158c994d961c4cb21095c1bf9", "12976a08c4426d0ce8a82407c4f48207", "e1a5668a4d5b66a5f68cc5424ed5982d", "9ae831e743978d3a23527c7128149e3a", "5154ad0d2cb26e01274fc51148491f1b"},
	} {
		k := keyFromBytes(append(append(make([]byte, 32), unhex(t, v.k)...), unhex(t, v.r)...))
		message, nonce := unhex(t, v.message), unhex(t, v.nonce)
		// What decrypts to something has the paper's MAC over it.
		if _, err := k.Open(nil, append(append(nonce, message...), unhex(t, v.mac)...)); err != nil {
			t.Errorf("message %s: %v", v.message, err)
		}
	}
}

// NIST SP 800-38A, F.5.5: AES-256 in counter mode.
func TestCipherMatchesNISTsVector(t *testing.T) {
	raw := make([]byte, 64)
	copy(raw, unhex(t, "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"))
	raw[40], raw[50] = 1, 1
	k := keyFromBytes(raw)
	iv := unhex(t, "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
	plain := unhex(t, "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")
	sealed := k.sealWith(bytes.Clone(iv), 0, plain)
	want := unhex(t, "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c52b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6")
	if got := sealed[16 : len(sealed)-16]; !bytes.Equal(got, want) {
		t.Errorf("ciphertext %x, want %x", got, want)
	}
	// The MAC is over the ciphertext, with the IV under the MAC's own AES key.
	block, err := aes.NewCipher(raw[32:48])
	if err != nil {
		t.Fatal(err)
	}
	var key [32]byte
	copy(key[:], raw[48:])
	block.Encrypt(key[16:], iv)
	var mac [16]byte
	poly1305.Sum(&mac, want, &key)
	if !bytes.Equal(sealed[len(sealed)-16:], mac[:]) {
		t.Errorf("MAC %x, want %x", sealed[len(sealed)-16:], mac)
	}
}

func TestSealedOpensAndEveryFlippedBitIsNoticed(t *testing.T) {
	k := NewKey()
	for _, size := range []int{0, 1, 15, 16, 17, 1000} {
		plain := bytes.Repeat([]byte{7}, size)
		prefix := []byte("prefix")
		sealed := k.Seal(bytes.Clone(prefix), plain)
		if !bytes.HasPrefix(sealed, prefix) {
			t.Fatal("Seal does not append")
		}
		sealed = sealed[len(prefix):]
		if len(sealed) != size+Overhead {
			t.Fatalf("%d bytes became %d", size, len(sealed))
		}
		got, err := k.Open(bytes.Clone(prefix), sealed)
		if err != nil || !bytes.Equal(got, append(bytes.Clone(prefix), plain...)) {
			t.Fatalf("%d bytes: got %x, %v", size, got, err)
		}
		for bit := range len(sealed) * 8 {
			bad := bytes.Clone(sealed)
			bad[bit/8] ^= 1 << (bit % 8)
			keep := bytes.Clone(bad)
			if _, err := k.OpenInPlace(bad); !errors.Is(err, ErrUnauthenticated) {
				t.Fatalf("%d bytes, bit %d flipped: %v", size, bit, err)
			}
			if !bytes.Equal(bad, keep) {
				t.Fatal("OpenInPlace changed what it refused")
			}
		}
		got, err = k.OpenInPlace(sealed)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("in place, %d bytes: got %x, %v", size, got, err)
		}
	}
}

func TestShortAndForeignTextsAreRefused(t *testing.T) {
	k := NewKey()
	for n := range Overhead {
		if _, err := k.Open(nil, make([]byte, n)); !errors.Is(err, ErrUnauthenticated) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if _, err := NewKey().Open(nil, k.Seal(nil, []byte("x"))); !errors.Is(err, ErrUnauthenticated) {
		t.Errorf("another key: %v", err)
	}
}

func TestEachSealHasItsOwnIV(t *testing.T) {
	k, seen := NewKey(), map[string]bool{}
	for range 1000 {
		iv := string(k.Seal(nil, nil)[:ivSize])
		if seen[iv] {
			t.Fatal("an IV came twice")
		}
		seen[iv] = true
	}
}

func TestKeyJSONRoundTripsAndBadOnesAreRefused(t *testing.T) {
	k := NewKey()
	data, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	var again Key
	if err := json.Unmarshal(data, &again); err != nil {
		t.Fatal(err)
	}
	if plain, err := again.Open(nil, k.Seal(nil, []byte("x"))); err != nil || string(plain) != "x" {
		t.Errorf("%q, %v", plain, err)
	}
	for _, bad := range []string{`{}`, `{"mac":{"k":"AA==","r":"AA=="},"encrypt":"AA=="}`, `[`, `{"mac":{"k":"AAAAAAAAAAAAAAAAAAAAAA==","r":"AAAAAAAAAAAAAAAAAAAAAA=="},"encrypt":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`} {
		if err := json.Unmarshal([]byte(bad), &again); err == nil {
			t.Errorf("%s is taken for a key", bad)
		}
	}
}

func TestCostlyAndInvalidKDFParametersAreRefused(t *testing.T) {
	for _, p := range []Params{{}, {N: 1, R: 8, P: 1}, {N: 1000, R: 8, P: 1}, {N: 1024, P: 1}, {N: 1024, R: 8}, {N: 1 << 22, R: 8, P: 1}, {N: 2, R: 1 << 20, P: 1 << 20}, {N: -2, R: 1, P: 1}} {
		if _, err := Derive(p, NewSalt(), "x"); err == nil {
			t.Errorf("%+v is accepted", p)
		}
	}
	if _, err := Derive(Params{N: 1024, R: 8, P: 1}, nil, "x"); err == nil {
		t.Error("an empty salt is accepted")
	}
}

func TestCalibratedParametersAreNeverWeak(t *testing.T) {
	p, err := Calibrate(time.Nanosecond)
	if err != nil || p != (Params{N: 1 << 15, R: 8, P: 1}) {
		t.Errorf("%+v, %v", p, err)
	}
}

func BenchmarkSeal1MiB(b *testing.B) {
	k, plain := NewKey(), make([]byte, 1<<20)
	buf := make([]byte, 0, len(plain)+Overhead)
	b.SetBytes(int64(len(plain)))
	for b.Loop() {
		buf = k.Seal(buf[:0], plain)
	}
}
