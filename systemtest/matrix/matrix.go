// SPDX-License-Identifier: BSD-2-Clause

// Package matrix keeps the tables in docs/matrix.md, which say what a backup does
// after each thing that can happen to a tracked device. The tests that make
// these things happen write them, and fail when they say something else.
package matrix

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// Row is what was seen of one event.
type Row struct {
	Event string
	Next  string // where the next backup's changes came from
	Why   string // its fallback_reason
	After string // the changes of the backup after that
}

// WriteEnv has the tables written instead of compared.
const WriteEnv = "DSYNC_WRITE_DOCS"

var (
	uuid     = regexp.MustCompile(`\b[0-9a-f]{32}\b`)
	snapshot = regexp.MustCompile(`snapshot [0-9a-f]{8}\b`)
	node     = regexp.MustCompile(`/dev/[a-z/]*[a-z0-9-]+`)
	folder   = regexp.MustCompile(`the log \S+`)
	temp     = regexp.MustCompile(`/tmp/\S+`)
	number   = regexp.MustCompile(`\b\d{3,}\b`)
)

// plain leaves out of a reason what is another each time.
func plain(s string) string {
	s = uuid.ReplaceAllString(s, "…")
	s = snapshot.ReplaceAllString(s, "snapshot …")
	s = temp.ReplaceAllString(s, "PATH")
	s = node.ReplaceAllString(s, "DEVICE")
	s = folder.ReplaceAllString(s, "the log")
	s = number.ReplaceAllString(s, "N")
	return strings.ReplaceAll(s, "|", "/")
}

// checking: tests of several sections may run at once.
var checking sync.Mutex

// Check compares rows, in their order, with a section of the docs' file, which stands
// between the lines "<!-- NAME -->" and "<!-- end -->". One that is not there yet is
// written only when that is asked for.
func Check(t testing.TB, file, name string, rows []Row) {
	t.Helper()
	checking.Lock()
	defer checking.Unlock()
	var b strings.Builder
	b.WriteString("| what happened | next backup | why | the one after |\n|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.Event, r.Next, plain(r.Why), r.After)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, there := strings.Cut(string(text), "<!-- "+name+" -->\n")
	have, tail, whole := strings.Cut(rest, "<!-- end -->\n")
	switch {
	case there && !whole:
		t.Fatalf("%s: the section %q has no end", file, name)
	case there && have == b.String():
		return
	case !there && os.Getenv(WriteEnv) == "":
		t.Logf("%s has no table of %s yet (run again with %s=1 to write it):\n%s", file, name, WriteEnv, b.String())
		return
	case !there:
		head += "\n## " + strings.ToUpper(name[:1]) + name[1:] + "\n\n"
	}
	if os.Getenv(WriteEnv) == "" {
		t.Errorf("%s says of %s:\n%sbut this was seen (run again with %s=1 to write it):\n%s", file, name, have, WriteEnv, b.String())
		return
	}
	text = []byte(head + "<!-- " + name + " -->\n" + b.String() + "<!-- end -->\n" + tail)
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
}
