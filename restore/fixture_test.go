// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/local"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/blockindex"
	"github.com/dsync-backup/dsync-backup/snapshot/blocksum"
	"github.com/dsync-backup/dsync-backup/snapshot/device"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

const (
	testPassword = "correct horse"
	deviceName   = "/dev/model"
)

// fixture is a repository, and a model of a device that is backed up to it.
type fixture struct {
	testing.TB
	rnd   *rand.Rand
	dir   string // of the repository
	repo  *repo.Repository
	w     *repo.Writer
	store snapshot.Store
	key   blocksum.Key

	image  []byte
	layers []*repo.Node
	snaps  []snap
}

// source is a device as layers read it.
type source struct{ *device.Device }

func (source) Buffer(n int) []byte { return device.AlignedBuffer(n) }

// snap is a snapshot of the model, and what it must give.
type snap struct {
	device snapshot.Device
	image  []byte
}

// newFixture makes a repository and an empty model of size bytes. The seed is
// told when the test fails.
func newFixture(t testing.TB, seed uint64, size int) *fixture {
	t.Helper()
	f := &fixture{TB: t, rnd: rand.New(rand.NewPCG(seed, 0)), dir: filepath.Join(t.TempDir(), "repo"), image: make([]byte, size)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	be := f.backend()
	var err error
	f.repo, err = repo.Init(t.Context(), be, testPassword, repo.Options{KDF: repo.KDFParams{N: 1024, R: 8, P: 1}})
	f.must(err)
	t.Cleanup(func() { f.repo.Close() })
	f.w = f.repo.NewWriter(t.Context(), repo.WriterOptions{})
	f.store = snapshot.Store{Repository: f.repo}
	f.fill(f.key[:])
	return f
}

func (f *fixture) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) backend() backend.Backend {
	f.Helper()
	be, err := local.Open(f.dir, local.Options{})
	f.must(err)
	f.Cleanup(func() { be.Close() })
	return be
}

// reopen is the repository as somebody else sees it.
func (f *fixture) reopen() *repo.Repository {
	f.Helper()
	r, err := repo.Open(f.Context(), f.backend(), testPassword, repo.Options{})
	f.must(err)
	f.Cleanup(func() { r.Close() })
	return r
}

// fill makes incompressible bytes.
func (f *fixture) fill(p []byte) {
	for i := range p {
		p[i] = byte(f.rnd.Uint32())
	}
}

// backup stores the ranges of the model, aligned, as a new layer, and names all
// layers in a snapshot. With parts the layer is cut into about so many.
func (f *fixture) backup(parts int, ranges ...kernel.Extent) snap {
	f.Helper()
	ranges = kernel.Align(ranges, int64(len(f.image)))
	path := filepath.Join(f.TempDir(), "image")
	f.must(os.WriteFile(path, f.image, 0o600))
	src, err := device.Open(path, device.Options{})
	f.must(err)
	defer src.Close()
	res, err := layer.Write(f.Context(), f.w, layer.Options{
		Source: source{src}, Size: int64(len(f.image)), Key: &f.key, Polynomial: f.repo.ChunkerPolynomial(), Time: time.Unix(1e9, 0),
		Ranges: func(yield func(layer.Range) bool) {
			for _, e := range ranges {
				hole := blocksum.IsZero(f.image[e.Offset:e.End()])
				if !yield(layer.Range{Extent: e, Hole: hole}) {
					return
				}
			}
		},
	})
	f.must(err)
	if res.Tree != nil {
		tree := *res.Tree
		if parts > 1 {
			f.must(f.w.Flush(f.Context()))
			tree = f.resplit(tree, parts)
		}
		name, err := layer.NextName(&repo.Tree{Nodes: f.layers})
		f.must(err)
		f.layers = append(f.layers, layer.DirNode(name, tree, time.Unix(1e9, 0)))
	}
	s := snap{f.name(f.layers), slices.Clone(f.image)}
	f.snaps = append(f.snaps, s)
	return s
}

// saveTree stores a folder, which can be read once a snapshot is made.
func (f *fixture) saveTree(nodes ...*repo.Node) repo.ID {
	f.Helper()
	saved, err := f.w.SaveTree(f.Context(), &repo.Tree{Nodes: nodes})
	f.must(err)
	return saved.ID
}

// name makes a snapshot of the given layers.
func (f *fixture) name(layers []*repo.Node) snapshot.Device {
	f.Helper()
	at := time.Unix(1e9, 0)
	m := snapshot.Manifest{
		Version: 1, Device: deviceName, Size: int64(len(f.image)), BlockSize: kernel.BlockSize,
		SumKey: snapshot.SumKey(f.key), Layers: f.saveTree(layers...),
	}
	raw, err := json.Marshal(m)
	f.must(err)
	content, size, err := layer.SaveFile(f.Context(), f.w, raw)
	f.must(err)
	tree := f.saveTree(layer.FileNode("device.json", content, size, at), layer.DirNode("layers", m.Layers, at))
	return f.snapshot(tree)
}

// snapshot makes a snapshot of a device's folder and finds the device in it.
func (f *fixture) snapshot(folder repo.ID) snapshot.Device {
	f.Helper()
	ds, err := f.trySnapshot(folder)
	f.must(err)
	return ds[0]
}

func (f *fixture) trySnapshot(folder repo.ID) ([]snapshot.Device, error) {
	f.Helper()
	tree := folder
	names := strings.Split(strings.Trim(deviceName, "/"), "/")
	for _, name := range slices.Backward(names) {
		tree = f.saveTree(layer.DirNode(name, tree, time.Unix(1e9, 0)))
	}
	f.must(f.w.Flush(f.Context()))
	sn := &repo.Snapshot{Time: time.Now(), Tree: &tree, Paths: []string{deviceName}, Hostname: "model"}
	id, _, err := f.repo.SaveSnapshot(f.Context(), sn)
	f.must(err)
	return snapshot.Devices(f.Context(), f.store, id, sn)
}

// files are the nodes of a layer's only part.
func (f *fixture) files(tree repo.ID) (part *repo.Node, files *repo.Tree) {
	f.Helper()
	l, err := f.repo.LoadTree(f.Context(), tree)
	f.must(err)
	if len(l.Nodes) != 1 {
		f.Fatalf("the layer has %d parts, not one", len(l.Nodes))
	}
	files, err = f.repo.LoadTree(f.Context(), *l.Nodes[0].Subtree)
	f.must(err)
	return l.Nodes[0], files
}

// resplit cuts the only part of a layer into several that share its data.
func (f *fixture) resplit(tree repo.ID, parts int) repo.ID {
	f.Helper()
	_, files := f.files(tree)
	raw, err := layer.ReadFile(f.Context(), f.store, files.Find("index"))
	f.must(err)
	x, err := blockindex.Decode(raw)
	f.must(err)
	sums, err := layer.ReadFile(f.Context(), f.store, files.Find("sums"))
	f.must(err)
	var nodes []*repo.Node
	cuts := []int64{x.Start, x.End}
	for range parts - 1 {
		cuts = append(cuts, x.Start+f.rnd.Int64N((x.End-x.Start)/kernel.BlockSize+1)*kernel.BlockSize)
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	for i := range cuts[1:] {
		y := &blockindex.Index{Start: cuts[i], End: cuts[i+1], DataLength: x.DataLength}
		for _, e := range x.Extents {
			from, to := max(e.Offset, y.Start), min(e.End(), y.End)
			if from >= to {
				continue
			}
			if !e.Zero {
				e.Data += from - e.Offset
			}
			e.Offset, e.Length = from, to-from
			y.Append(e)
		}
		if len(y.Extents) == 0 {
			continue
		}
		n := y.DataBlocks() * blocksum.Size
		ids, size, err := layer.SaveFile(f.Context(), f.w, sums[:n])
		f.must(err)
		sums = sums[n:]
		node, err := layer.SavePart(f.Context(), f.w, layer.PartFiles{
			Index: y, Data: files.Find("data").Content, Sums: ids, SumSize: size, Time: time.Unix(1e9, 0),
		})
		f.must(err)
		nodes = append(nodes, node)
	}
	return f.saveTree(nodes...)
}

// mutate changes the model in one of the ways that layers must express, and
// returns what a tracker would have marked.
func (f *fixture) mutate() (dirty []kernel.Extent) {
	size := int64(len(f.image))
	touch := func(blocks int64, write func([]byte)) {
		off := f.rnd.Int64N(kernel.BlocksOf(size)) * kernel.BlockSize
		e := kernel.Extent{Offset: off, Length: min(blocks*kernel.BlockSize, size-off)}
		write(f.image[e.Offset:e.End()])
		dirty = append(dirty, e)
	}
	for range f.rnd.IntN(4) { // long runs, some with zeros inside
		touch(100+f.rnd.Int64N(900), func(p []byte) {
			f.fill(p)
			if len(p) > 1<<18 && f.rnd.IntN(2) == 0 {
				clear(p[8192 : 8192+4096*(1+f.rnd.IntN(30))])
			}
		})
	}
	for range f.rnd.IntN(300) { // scattered blocks
		touch(1+f.rnd.Int64N(3), f.fill)
	}
	for range f.rnd.IntN(40) { // zeros
		touch(1+f.rnd.Int64N(200), func(p []byte) { clear(p) })
	}
	touch(1+f.rnd.Int64N(4), func([]byte) {}) // written with what was there
	if f.rnd.IntN(2) == 0 {                   // the end, which may be a short block
		last := (size - 1) / kernel.BlockSize * kernel.BlockSize
		f.fill(f.image[last:])
		dirty = append(dirty, kernel.Extent{Offset: last, Length: size - last})
	}
	return dirty
}

// first backs up everything of a model that is full of variety.
func (f *fixture) first(parts int) snap {
	for range 3 {
		f.mutate()
	}
	return f.backup(parts, kernel.Extent{Length: int64(len(f.image))})
}

// loop binds a new loop device of size bytes full of garbage.
func (f *fixture) loop(size int64) string {
	f.Helper()
	path := filepath.Join(f.TempDir(), "disk")
	garbage := make([]byte, size)
	f.fill(garbage)
	f.must(os.WriteFile(path, garbage, 0o600))
	return f.bind(path)
}

// ext4 makes a file system on a device and mounts it.
func (f *fixture) ext4(dev string) (folder string) {
	f.Helper()
	folder = f.TempDir()
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", dev}, {"mount", dev, folder}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			f.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	f.Cleanup(func() {
		if out, err := exec.Command("umount", folder).CombinedOutput(); err != nil {
			f.Errorf("unmount %s: %v: %s", folder, err, out)
		}
	})
	return folder
}

func (f *fixture) bind(path string) string {
	f.Helper()
	out, err := exec.Command("losetup", "--find", "--show", path).Output()
	if err != nil {
		f.Fatalf("bind a loop device (this test needs root and loop devices): %v", err)
	}
	dev := strings.TrimSpace(string(out))
	f.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			f.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

// content reads a device or file past the page cache.
func (f *fixture) content(path string) []byte {
	f.Helper()
	d, err := device.Open(path, device.Options{})
	f.must(err)
	defer d.Close()
	buf := device.AlignedBuffer(int(d.Size()))
	f.must(d.ReadExtent(f.Context(), buf, 0))
	return buf
}

// same fails at the first byte that differs.
func (f *fixture) same(what string, got, want []byte) {
	f.Helper()
	if len(got) != len(want) {
		f.Fatalf("%s has %d bytes, want %d", what, len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			f.Fatalf("%s differs at byte %d (block %d): %#x, want %#x", what, i, i/kernel.BlockSize, got[i], want[i])
		}
	}
}

// restore restores to a target and checks the result's sums.
func (f *fixture) restore(o Options) *Result {
	f.Helper()
	res, err := Restore(f.Context(), f.store, o)
	f.must(err)
	if n := res.BytesWritten + res.BytesSkipped + res.BytesZeroed; n != o.Device.Manifest.Size {
		f.Fatalf("%d bytes were written, %d skipped, %d zeroed: not the device's %d", res.BytesWritten, res.BytesSkipped, res.BytesZeroed, o.Device.Manifest.Size)
	}
	return res
}

func (f *fixture) newFile() string { return filepath.Join(f.TempDir(), "restored") }

func soak() bool { return os.Getenv("SOAK") == "1" }

// seed is a new one each time, or SEED.
func seed(t testing.TB) uint64 {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("SEED"); v != "" {
		if err := json.Unmarshal([]byte(v), &s); err != nil {
			t.Fatal(err)
		}
	}
	return s
}
