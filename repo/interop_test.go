// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// randomBytes are bytes of which about half can be compressed away.
func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, 0, n+8)
	for len(b) < n {
		b = binary.LittleEndian.AppendUint64(b, rng.Uint64()&0x0f0f0f0f0f0f0f0f)
	}
	return b[:n]
}

// testBackup writes a snapshot with two files in a folder and returns its ID
// and what the files hold.
func testBackup(t testing.TB, r *Repository, rng *rand.Rand) (ID, map[string][]byte) {
	t.Helper()
	ctx := t.Context()
	w := r.NewWriter(ctx, WriterOptions{})
	id, content := writeBackup(t, w, rng)
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	sid, _, err := r.SaveSnapshot(ctx, &Snapshot{
		Time: time.Now(), Tree: &id, Paths: []string{"/dev/test"}, Hostname: "host", Username: "root",
		Tags: []string{"dsync"}, ProgramVersion: "dsync-backup test",
	})
	if err != nil {
		t.Fatal(err)
	}
	return sid, content
}

// writeBackup saves a tree: dir/{data, meta, empty}.
func writeBackup(t testing.TB, w *Writer, rng *rand.Rand) (ID, map[string][]byte) {
	t.Helper()
	now := time.Now()
	content := map[string][]byte{"dir/empty": nil}
	file := func(name string, kind Kind, sizes ...int) *Node {
		n := &Node{Name: name, Type: NodeFile, Mode: 0o600, ModTime: now, AccessTime: now, ChangeTime: now, Links: 1, Content: []ID{}}
		for _, size := range sizes {
			b := randomBytes(rng, size)
			s, err := w.SaveBlob(t.Context(), kind, b)
			if err != nil {
				t.Fatal(err)
			}
			n.Content = append(n.Content, s.ID)
			n.Size += uint64(len(b))
			content["dir/"+name] = append(content["dir/"+name], b...)
		}
		return n
	}
	sub := &Tree{Nodes: []*Node{
		file("meta", KindMeta, 100, 5000),
		file("data", KindData, 1<<20, 300_000, 300_000, 1),
		file("empty", KindData),
	}}
	s, err := w.SaveTree(t.Context(), sub)
	if err != nil {
		t.Fatal(err)
	}
	root := &Tree{Nodes: []*Node{{Name: "dir", Type: NodeDir, Mode: fs.ModeDir | 0o700, ModTime: now, AccessTime: now, ChangeTime: now, Subtree: &s.ID}}}
	if s, err = w.SaveTree(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	return s.ID, content
}

func newRand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func TestStockResticReadsWhatWeWrite(t *testing.T) {
	for _, c := range []Compression{CompressionAuto, CompressionOff, CompressionFastest, CompressionBetter, CompressionMax} {
		t.Run(string(c), func(t *testing.T) {
			r, dir := newRepo(t, Options{Compression: c})
			id, content := testBackup(t, r, newRand(t))
			mustHold(t, dir, id.String(), content)
			if c != CompressionAuto && c != CompressionOff {
				mustCheckCleanOnce(t, dir) // what is left is the same for all levels
				return
			}
			mustCheckClean(t, dir)
			for _, s := range stockRestics(t) {
				for name, want := range content {
					if got := s.run(t, dir, "dump", id.String(), "/"+name); !bytes.Equal(got, want) {
						t.Errorf("restic %s dump %s: %d bytes differ from the %d saved", s.version, name, len(got), len(want))
					}
				}
				list := s.run(t, dir, "ls", id.String())
				for name := range content {
					if !bytes.Contains(list, []byte("/"+name+"\n")) {
						t.Errorf("restic %s ls does not show %s: %s", s.version, name, list)
					}
				}
			}
		})
	}
}

func TestStockResticCopiesPrunesAndRewritesWhatWeWrite(t *testing.T) {
	for _, s := range stockRestics(t) {
		t.Run(s.version, func(t *testing.T) {
			rng := newRand(t)
			r, dir := newRepo(t, Options{})
			first, _ := testBackup(t, r, rng)
			second, content := testBackup(t, r, rng)

			other := filepath.Join(t.TempDir(), "other")
			s.run(t, other, "init")
			s.run(t, other, "copy", "--from-repo", dir, second.String())
			mustCheckClean(t, other)
			mustHold(t, other, "latest", content)

			s.run(t, dir, "forget", "--prune", first.String())
			mustCheckClean(t, dir)
			mustHold(t, dir, second.String(), content)

			if s.version != "0.14.0" { // rewrite came with 0.15
				s.run(t, dir, "rewrite", "--forget", "--exclude", "/dir/meta", second.String())
				delete(content, "dir/meta")
				mustCheckClean(t, dir)
				mustHold(t, dir, "latest", content)
			}
		})
	}
}

// mustHold reads a snapshot through our own reader and compares its files.
func mustHold(t testing.TB, dir, snapshot string, content map[string][]byte) {
	t.Helper()
	r := reopen(t, dir, Options{CacheDir: t.TempDir()})
	_, s, err := r.FindSnapshot(t.Context(), snapshot, SnapshotFilter{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]byte{}
	readTree(t, r, *s.Tree, "", got)
	if len(got) != len(content) {
		t.Errorf("snapshot %s holds %d files, want %d", snapshot, len(got), len(content))
	}
	for name, want := range content {
		if !bytes.Equal(got[name], want) {
			t.Errorf("snapshot %s: %s holds %d other bytes than the %d saved", snapshot, name, len(got[name]), len(want))
		}
	}
}

// readTree reads all files below a directory, and proves that every directory
// encodes to the very bytes that it was decoded from.
func readTree(t testing.TB, r *Repository, id ID, prefix string, files map[string][]byte) {
	t.Helper()
	tree, err := r.LoadTree(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	again, err := tree.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if Hash(again) != id {
		t.Errorf("tree %s (%q) encodes to something else: %.2000s", id.Str(), prefix, again)
	}
	for _, n := range tree.Nodes {
		switch n.Type {
		case NodeDir:
			readTree(t, r, *n.Subtree, prefix+n.Name+"/", files)
		case NodeFile:
			b := []byte{}
			for _, c := range n.Content {
				blob, err := r.LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: c}, KindData)
				if err != nil {
					t.Fatal(err)
				}
				b = append(b, blob...)
			}
			if uint64(len(b)) != n.Size {
				t.Errorf("%s%s: size %d, content of %d bytes", prefix, n.Name, n.Size, len(b))
			}
			files[prefix+n.Name] = b
		}
	}
}

func TestWeReadWhatStockResticWrites(t *testing.T) {
	for _, s := range stockRestics(t) {
		for _, version := range []string{"1", "2"} {
			t.Run(fmt.Sprintf("restic %s format %s", s.version, version), func(t *testing.T) {
				src := filepath.Join(t.TempDir(), "files")
				want := oddFiles(t, src)
				if s.version != "0.14.0" {
					// 0.14 loses what is not UTF-8 in a link's target, in a way
					// that no later encoder repeats.
					if err := os.Symlink("raw\xfftarget", filepath.Join(src, "rawlink")); err != nil {
						t.Fatal(err)
					}
				}
				dir := filepath.Join(t.TempDir(), "repo")
				s.run(t, dir, "init", "--repository-version", version)
				s.run(t, dir, "backup", "--tag", "a", "--host", "h", src)

				r := reopen(t, dir, Options{})
				if fmt.Sprint(r.Version()) != version {
					t.Errorf("version %d, want %s", r.Version(), version)
				}
				id, snapshot, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{Hosts: []string{"h"}, Tags: [][]string{{"a"}}, Paths: []string{src}})
				if err != nil {
					t.Fatal(err)
				}
				got := map[string][]byte{}
				readTree(t, r, *snapshot.Tree, "/", got)
				for name, content := range want {
					if !bytes.Equal(got[filepath.Join(src, name)], content) {
						t.Errorf("%q: %d bytes, want %d", name, len(got[filepath.Join(src, name)]), len(content))
					}
				}
				if len(got) != len(want) {
					t.Errorf("%d files, want %d", len(got), len(want))
				}
				theirs := fromJSON[[]map[string]any](t, s.run(t, dir, "snapshots", "--json"))
				if len(theirs) != 1 || theirs[0]["id"] != id.String() {
					t.Errorf("restic lists %v, we found %s", theirs, id)
				}
			})
		}
	}
}

// oddFiles makes a tree with what is easily encoded wrong, and returns the
// contents of its files.
func oddFiles(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	rng := newRand(t)
	files := map[string][]byte{
		"plain": []byte("text"), "empty": {}, "large": randomBytes(rng, 9<<20),
		"<html> & co": []byte("h"), "quo\"te\\back": []byte("q"), "new\nline\ttab": []byte("n"),
		"not\xff\xfeutf8": []byte("u"), "ünïcödé \u2028\u2029": []byte("s"), "bell\a\b\f": []byte("b"), "\x01": []byte("c"),
		"sub/dir/deep": []byte("d"),
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(dir, "emptydir"), 0o1777))
	must(os.Chmod(filepath.Join(dir, "emptydir"), os.ModeSticky|0o777))
	must(os.Symlink("some <target>", filepath.Join(dir, "link")))
	must(os.Link(filepath.Join(dir, "plain"), filepath.Join(dir, "hardlink")))
	files["hardlink"] = files["plain"]
	must(os.Chtimes(filepath.Join(dir, "plain"), time.Unix(-86400, 1), time.Unix(1<<33, 999999999)))
	return files
}
