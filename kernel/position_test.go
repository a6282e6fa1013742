// SPDX-License-Identifier: BSD-2-Clause

package kernel

import (
	"encoding/json"
	"testing"
)

func TestPositionGoesThroughJSON(t *testing.T) {
	p := Position{UUID{1, 0xab}, 1<<63 + 7, Nonce{15: 0xff}}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"tracker":"01ab0000000000000000000000000000","epoch":9223372036854775815,"nonce":"000000000000000000000000000000ff"}`
	if string(b) != want {
		t.Fatalf("got %s, want %s", b, want)
	}
	var back Position
	if err := json.Unmarshal(b, &back); err != nil || back != p {
		t.Fatalf("got %v, want %v: %v", back, p, err)
	}
}

func TestPositionRejectsBadText(t *testing.T) {
	for _, s := range []string{`""`, `"01ab"`, `"zz000000000000000000000000000000"`, `"01ab00000000000000000000000000000"`} {
		var u UUID
		var n Nonce
		if json.Unmarshal([]byte(s), &u) == nil || json.Unmarshal([]byte(s), &n) == nil {
			t.Errorf("%s was read", s)
		}
	}
}

func TestNewNamesDiffer(t *testing.T) {
	u, n := NewUUID(), NewNonce()
	if u == NewUUID() || n == NewNonce() {
		t.Fatal("drew the same name twice")
	}
	if NewUUID() == (UUID{}) || !(Position{}).IsZero() || (Position{Epoch: 1}).IsZero() {
		t.Fatal("zero is taken for a name, or the other way round")
	}
}
