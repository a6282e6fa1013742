// SPDX-License-Identifier: BSD-2-Clause

package matrix

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// recorder is a test that may fail.
type recorder struct {
	testing.TB
	failed string
}

func (r *recorder) Helper()                      {}
func (r *recorder) Logf(string, ...any)          {}
func (r *recorder) Errorf(f string, args ...any) { r.failed += fmt.Sprintf(f, args...) }

func TestATableIsWrittenWhenAskedAndHeldToWhatIsSeen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "docs.md")
	if err := os.WriteFile(file, []byte("# Head\n\n<!-- first -->\n<!-- end -->\ntail\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	rows := []Row{{"it | rained", "compare", "snapshot 0a1b2c3d: /dev/loop7 has 123456 bytes", "tracker"}}
	fails := func(section string, rows []Row) bool {
		r := &recorder{TB: t}
		Check(r, file, section, rows)
		return r.failed != ""
	}
	if !fails("first", rows) {
		t.Error("an empty table passes for one with a row")
	}
	if fails("second", rows) {
		t.Error("a table that is not there fails")
	}
	t.Setenv(WriteEnv, "1")
	for _, section := range []string{"first", "second"} {
		if fails(section, rows) {
			t.Fatal("not written")
		}
	}
	t.Setenv(WriteEnv, "")
	for _, section := range []string{"first", "second"} {
		if fails(section, rows) || !fails(section, append(rows, rows[0])) || !fails(section, nil) {
			t.Errorf("the table %s is not held to", section)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil || !strings.Contains(string(text), "| compare | snapshot …: DEVICE has N bytes | tracker |") || !strings.Contains(string(text), "-->\ntail\n") || !strings.Contains(string(text), "## Second") {
		t.Errorf("%v: %s", err, text)
	}
}
