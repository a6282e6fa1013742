// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/index"
)

func TestSamplesInTheDocumentAreWhatIsWritten(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join(moduleRoot(t), "docs", "repository.md"))
	if err != nil {
		t.Fatal(err)
	}
	codecs := map[string]func([]byte) ([]byte, error){
		"tree": func(b []byte) ([]byte, error) {
			tree, err := DecodeTree(b)
			if err != nil {
				return nil, err
			}
			return tree.Encode()
		},
		"index": func(b []byte) ([]byte, error) {
			packs, err := index.Decode(b)
			if err != nil {
				return nil, err
			}
			return index.Encode(packs)
		},
		"snapshot": func(b []byte) ([]byte, error) {
			var s Snapshot
			if err := json.Unmarshal(b, &s); err != nil {
				return nil, err
			}
			out, err := json.Marshal(s)
			return append(out, '\n'), err
		},
	}
	samples := regexp.MustCompile("(?ms)^```json ([a-z]+)\n(.*?)^```").FindAllSubmatch(doc, -1)
	if len(samples) != len(codecs) {
		t.Errorf("%d samples, want %d", len(samples), len(codecs))
	}
	for _, s := range samples {
		got, err := codecs[string(s[1])](s[2])
		if err != nil || !bytes.Equal(got, s[2]) {
			t.Errorf("%s: got %s, %v", s[1], got, err)
		}
	}
}
