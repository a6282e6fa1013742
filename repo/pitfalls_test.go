// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/index"
)

// What other writers of this format got wrong, one test each.

func TestNodesAreSortedByName(t *testing.T) {
	id := ID{1}
	tree := &Tree{Nodes: []*Node{
		{Name: "b", Type: NodeDir, Subtree: &id},
		{Name: "a b", Type: NodeDir, Subtree: &id},
		{Name: "a", Type: NodeDir, Subtree: &id},
		{Name: "ä", Type: NodeDir, Subtree: &id},
		{Name: "B", Type: NodeDir, Subtree: &id},
	}}
	data, err := tree.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := DecodeTree(data)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range again.Nodes {
		names = append(names, n.Name)
	}
	if want := []string{"B", "a", "a b", "b", "ä"}; !slices.Equal(names, want) {
		t.Errorf("names %q, want %q", names, want)
	}
	if tree.Nodes[0].Name != "b" {
		t.Error("Encode changed the caller's tree")
	}
}

func TestNodesOfTheSameNameAreRefused(t *testing.T) {
	_, err := (&Tree{Nodes: []*Node{{Name: "a", Type: NodeFile}, {Name: "b", Type: NodeFile}, {Name: "a", Type: NodeFile}}}).Encode()
	if err == nil || !strings.Contains(err.Error(), `"a" is there twice`) {
		t.Error(err)
	}
}

func TestTreeJSONIsByteForByteAsResticWritesIt(t *testing.T) {
	when := time.Date(2024, 2, 29, 12, 0, 0, 120_000_000, time.FixedZone("", 3600))
	id := ID{0xab}
	got, err := (&Tree{Nodes: []*Node{
		{Name: "file", Type: NodeFile, Mode: 0o644, ModTime: when, AccessTime: when, ChangeTime: when, UID: 1, GID: 2, User: "u", Group: "g", Inode: 3, DeviceID: 4, Size: 5, Links: 1, Content: []ID{id}},
		{Name: "<&>\"\\\n\xff", Type: NodeDir, Mode: fs.ModeDir | 0o755, ModTime: time.Date(-5, 1, 1, 0, 0, 0, 0, time.UTC), AccessTime: time.Date(12345, 1, 1, 0, 0, 0, 0, time.UTC), ChangeTime: when.UTC(), Subtree: &id},
	}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	want := `{"nodes":[{"name":"\u003c\u0026\u003e\\\"\\\\\\n\\xff","type":"dir","mode":2147484141,"mtime":"0000-01-01T00:00:00Z","atime":"9999-01-01T00:00:00Z","ctime":"2024-02-29T11:00:00.12Z","uid":0,"gid":0,"content":null,"subtree":"ab` + strings.Repeat("0", 62) + `"},` +
		`{"name":"file","type":"file","mode":420,"mtime":"2024-02-29T12:00:00.12+01:00","atime":"2024-02-29T12:00:00.12+01:00","ctime":"2024-02-29T12:00:00.12+01:00","uid":1,"gid":2,"user":"u","group":"g","inode":3,"device_id":4,"size":5,"links":1,"content":["ab` + strings.Repeat("0", 62) + `"]}]}` + "\n"
	if string(got) != want {
		t.Errorf("got  %swant %s", got, want)
	}
}

func TestTreeEndsWithANewline(t *testing.T) {
	got, err := (&Tree{}).Encode()
	if err != nil || string(got) != `{"nodes":[]}`+"\n" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestContentOfAnEmptyFileIsAnEmptyListAndOfADirectoryNull(t *testing.T) {
	id := ID{}
	got, err := (&Tree{Nodes: []*Node{{Name: "d", Type: NodeDir, Subtree: &id}, {Name: "f", Type: NodeFile}, {Name: "g", Type: NodeFile, Content: []ID{}}}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"d": "null", "f": "[]", "g": "[]"} {
		for _, n := range fromJSON[struct{ Nodes []map[string]json.RawMessage }](t, got).Nodes {
			if string(n["name"]) == `"`+name+`"` && string(n["content"]) != want {
				t.Errorf("content of %s is %s, want %s", name, n["content"], want)
			}
		}
	}
}

func TestTreesThatResticWouldNotWriteAreRefused(t *testing.T) {
	id := ID{}
	for name, n := range map[string]*Node{
		"content in a directory":      {Name: "a", Type: NodeDir, Subtree: &id, Content: []ID{}},
		"directory without a subtree": {Name: "a", Type: NodeDir},
		"file with a subtree":         {Name: "a", Type: NodeFile, Subtree: &id},
		"content in a link":           {Name: "a", Type: "symlink", Content: []ID{id}},
		"no name":                     {Type: NodeFile},
		"two components":              {Name: "a/b", Type: NodeFile},
		"parent":                      {Name: "..", Type: NodeFile},
	} {
		if _, err := (&Tree{Nodes: []*Node{n}}).Encode(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A prune keeps the blobs of nodes of type file alone: ours, metadata
// included, hang on such nodes, so they live through one that drops the rest.
func TestEveryBlobOfASnapshotSurvivesAPrune(t *testing.T) {
	for _, s := range stockRestics(t) {
		r, dir := newRepo(t, Options{})
		rng := newRand(t)
		_, content := testBackup(t, r, rng)
		w := r.NewWriter(t.Context(), WriterOptions{})
		orphan, err := w.SaveBlob(t.Context(), KindMeta, randomBytes(rng, 1000))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.run(t, dir, "prune", "--max-unused", "0")
		mustCheckClean(t, dir)
		mustHold(t, dir, "latest", content)
		if reopen(t, dir, Options{}).Has(BlobHandle{Type: DataBlob, ID: orphan.ID}) {
			t.Error("the prune did nothing")
		}
	}
}

func TestSizeOfAFileIsTheSumOfItsBlobs(t *testing.T) {
	r, _ := newRepo(t, Options{})
	w := r.NewWriter(t.Context(), WriterOptions{})
	s, err := w.SaveBlob(t.Context(), KindData, []byte("four"))
	if err != nil {
		t.Fatal(err)
	}
	save := func(size uint64, content ...ID) error {
		_, err := w.SaveTree(t.Context(), &Tree{Nodes: []*Node{{Name: "f", Type: NodeFile, Size: size, Content: content}}})
		return err
	}
	for range 2 { // before the blob is indexed, and after
		if err := save(7, s.ID, s.ID); err == nil || !strings.Contains(err.Error(), "its size is 7 bytes, but its blobs have 8") {
			t.Error(err)
		}
		if err := save(8, s.ID, s.ID); err != nil {
			t.Error(err)
		}
		if err := save(4, ID{1}); !errors.Is(err, ErrBlobNotFound) {
			t.Error(err)
		}
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.SaveTree(t.Context(), &Tree{Nodes: []*Node{{Name: "d", Type: NodeDir, Subtree: &ID{2}}}}); !errors.Is(err, ErrBlobNotFound) {
		t.Error(err)
	}
}

func TestEachPackBelongsWhollyToOneIndexFile(t *testing.T) {
	r, dir := newRepo(t, Options{PackSize: MinPackSize})
	rng := newRand(t)
	w := r.NewWriter(t.Context(), WriterOptions{})
	w.indexBlobs = 30 // an index file after every few packs
	for range 100 {
		if _, err := w.SaveBlob(t.Context(), Kind(rng.IntN(2)), randomBytes(rng, 400_000+rng.IntN(1000))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	stats := w.Stats()
	if stats.IndexFiles < 2 {
		t.Fatalf("%d index files prove nothing", stats.IndexFiles)
	}
	seen := map[ID]int{}
	for id, packs := range indexFiles(t, r) {
		for _, p := range packs {
			seen[p.ID]++
			info, err := r.be.Stat(t.Context(), packHandle(p.ID))
			if err != nil {
				t.Fatal(err)
			}
			blobs, err := r.ListPack(t.Context(), p.ID, info.Size)
			if err != nil || !slices.Equal(blobs, p.Blobs) {
				t.Errorf("index %s lists %d blobs of pack %s, which has %d: %v", id.Str(), len(p.Blobs), p.ID.Str(), len(blobs), err)
			}
		}
	}
	packs, err := listIDs(t.Context(), r.be, backend.PackFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packs {
		if seen[p.id] != 1 {
			t.Errorf("pack %s is in %d index files", p.id.Str(), seen[p.id])
		}
	}
	if len(packs) != stats.Data.Packs+stats.Meta.Packs {
		t.Errorf("%d packs, counted %+v", len(packs), stats)
	}
	mustCheckClean(t, dir)
}

func indexFiles(t testing.TB, r *Repository) map[ID][]index.Pack {
	t.Helper()
	files, err := listIDs(t.Context(), r.be, backend.IndexFile)
	if err != nil {
		t.Fatal(err)
	}
	out := map[ID][]index.Pack{}
	for _, f := range files {
		plain, err := r.loadUnpacked(t.Context(), backend.IndexFile, f.id)
		if err != nil {
			t.Fatal(err)
		}
		if out[f.id], err = index.Decode(plain); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestABlobWithoutBytesIsNeverCompressed(t *testing.T) {
	for _, c := range []Compression{CompressionAuto, CompressionMax} {
		r, dir := newRepo(t, Options{Compression: c})
		w := r.NewWriter(t.Context(), WriterOptions{})
		s, err := w.SaveBlob(t.Context(), KindData, nil)
		if err != nil {
			t.Fatal(err)
		}
		root, err := w.SaveTree(t.Context(), &Tree{Nodes: []*Node{{Name: "f", Type: NodeFile, Content: []ID{s.ID}}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		loc, ok := r.Lookup(BlobHandle{Type: DataBlob, ID: s.ID})
		if !ok || loc.UncompressedLength != 0 || loc.Length != 32 {
			t.Errorf("stored as %+v, %v", loc, ok)
		}
		if data, err := r.LoadBlob(t.Context(), BlobHandle{Type: DataBlob, ID: s.ID}, KindData); err != nil || len(data) != 0 {
			t.Errorf("%q, %v", data, err)
		}
		if _, _, err := r.SaveSnapshot(t.Context(), &Snapshot{Time: time.Now(), Tree: &root.ID, Paths: []string{"/"}}); err != nil {
			t.Fatal(err)
		}
		mustCheckClean(t, dir)
	}
}

// restic's rewrite refuses trees with fields that it does not know, and loses
// such fields of snapshots: what it does not lose, it knows.
func TestNothingIsLostWhenResticRewritesASnapshot(t *testing.T) {
	for _, s := range stockRestics(t) {
		r, dir := newRepo(t, Options{})
		testBackup(t, r, newRand(t))
		_, first, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{})
		if err != nil {
			t.Fatal(err)
		}
		full := *first
		full.UID, full.GID, full.Excludes, full.Parent = 7, 8, []string{"*.x"}, &ID{3}
		if s.version != "0.14.0" { // these came later
			full.Summary = &SnapshotSummary{BackupStart: first.Time, BackupEnd: first.Time, FilesNew: 1, FilesChanged: 2, FilesUnmodified: 3, DirsNew: 4, DirsChanged: 5, DirsUnmodified: 6, DataBlobs: 7, TreeBlobs: 8, DataAdded: 9, DataAddedPacked: 10, TotalFilesProcessed: 11, TotalBytesProcessed: 12}
		} else {
			full.ProgramVersion = ""
		}
		id, _, err := r.SaveSnapshot(t.Context(), &full)
		if err != nil {
			t.Fatal(err)
		}
		s.run(t, dir, "tag", "--add", "more", id.String())
		_, got, err := r.FindSnapshot(t.Context(), "latest", SnapshotFilter{Tags: [][]string{{"more"}}})
		if err != nil {
			t.Fatal(err)
		}
		if got.Original == nil || *got.Original != id {
			t.Errorf("original is %v, want %s", got.Original, id)
		}
		got.Original, got.Tags = nil, full.Tags
		a, errA := json.Marshal(full)
		b, errB := json.Marshal(got)
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Errorf("restic %s made\n%s of\n%s", s.version, b, a)
		}
		if s.version != "0.14.0" {
			s.run(t, dir, "rewrite", "--forget", "--exclude", "/dir/empty", "latest")
			mustCheckClean(t, dir)
		}
	}
}

// FuzzTree proves that what decodes encodes the same way twice, and that no
// input makes the decoder panic.
func FuzzTree(f *testing.F) {
	f.Add([]byte(`{"nodes":[{"name":"a","type":"file","mode":420,"mtime":"2024-02-29T12:00:00.12+01:00","atime":"2024-02-29T12:00:00Z","ctime":"2024-02-29T12:00:00Z","uid":1,"gid":2,"user":"u","size":5,"content":["` + strings.Repeat("ab", 32) + `"]}]}`))
	f.Add([]byte(`{"nodes":[{"name":"\\xff\u2028","type":"dir","content":null,"subtree":"` + strings.Repeat("00", 32) + `","generic_attributes":{"a":{"b":"<"}}}]}`))
	f.Add([]byte(`{"nodes":[{"name":"l","type":"symlink","linktarget":"x","linktarget_raw":"/w==","extended_attributes":[{"name":"n","value":"AA=="}]}]}`))
	f.Add([]byte(`{"nodes":[null]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		tree, err := DecodeTree(data)
		if err != nil {
			return
		}
		first, err := tree.Encode()
		if err != nil {
			return
		}
		again, err := DecodeTree(first)
		if err != nil {
			t.Fatalf("%q does not decode: %v", first, err)
		}
		second, err := again.Encode()
		if err != nil || !bytes.Equal(first, second) {
			t.Errorf("%q became %q, %v", first, second, err)
		}
	})
}
