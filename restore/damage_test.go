// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/check"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// damaged is a repository with two layers, and a blob of data in it to harm.
type damaged struct {
	*fixture
	device snapshot.Device
	blob   repo.ID
	where  repo.Location
	ranges []kernel.Extent // that need the blob, in whole blocks
}

func newDamaged(t *testing.T) *damaged {
	f := newFixture(t, seed(t), 8<<20+777)
	f.first(1)
	f.fill(f.image[3<<20 : 5<<20]) // chunked, so that blobs share blocks
	d := &damaged{fixture: f, device: f.backup(1, kernel.Extent{Offset: 3 << 20, Length: 2 << 20}).device}
	c, err := openChain(t.Context(), f.store, d.device)
	f.must(err)
	f.must(c.walk(t.Context(), false, func(id repo.ID, s segment) error {
		if d.blob.IsNull() && s.off >= 3<<20 {
			d.blob = id
		}
		if id == d.blob {
			d.ranges = append(d.ranges, s.extent())
		}
		return nil
	}, nil))
	d.ranges = kernel.Align(d.ranges, int64(len(d.image)))
	d.where = f.repo.Locations(dataBlob(d.blob))[0]
	return d
}

func (d *damaged) packFile() string {
	name := d.where.Pack.String()
	return filepath.Join(d.dir, "data", name[:2], name)
}

// flip changes one byte of the blob in its pack.
func (d *damaged) flip() {
	d.Helper()
	path := d.packFile()
	d.must(os.Chmod(path, 0o600))
	b, err := os.ReadFile(path)
	d.must(err)
	b[int(d.where.Offset)+int(d.where.Length)/2] ^= 1
	d.must(os.WriteFile(path, b, 0o600))
}

// refused restores onto a target full of garbage, and makes sure that it still
// is, in every way of restoring. It returns the last error.
func (d *damaged) refused(dev snapshot.Device) (err error) {
	d.Helper()
	loop := d.loop(9 << 20)
	before := d.content(loop)
	for _, how := range []Changes{ChangesAll, ChangesCompare} {
		_, err = Restore(d.Context(), d.store, Options{Device: dev, Target: loop, Changes: how, Force: true})
		if err == nil || errors.Is(err, ErrIncomplete) || strings.Contains(err.Error(), "\n") {
			d.Fatalf("%s: restore of a damaged snapshot gave %v", how, err)
		}
	}
	d.same("the target", d.content(loop), before)
	file := d.newFile()
	if _, err := Restore(d.Context(), d.store, Options{Device: dev, Target: file}); err == nil {
		d.Fatal("the damaged snapshot was restored to a file")
	}
	if _, err := os.Lstat(file); err == nil {
		d.Error("the refused restore left a file")
	}
	if n, err := Dump(d.Context(), d.store, io.Discard, DumpOptions{Device: dev}); n != 0 || err == nil {
		d.Errorf("the dump gave %d bytes and %v", n, err)
	}
	return err
}

func (d *damaged) mustName(err error, want []kernel.Extent) {
	d.Helper()
	var damage *DamageError
	if !errors.As(err, &damage) || !errors.Is(err, layer.ErrDamaged) {
		d.Fatalf("the error is not about damage: %v", err)
	}
	if !slices.Equal(damage.Ranges, want) {
		d.Errorf("the error names %v, the blob gives %v", damage.Ranges, want)
	}
}

func TestAFlippedByteIsNamedByItsRangesAndTheRestIsRestored(t *testing.T) {
	d := newDamaged(t)
	d.flip()
	for _, lim := range []limits{restoreLimits(), {7, 2, 1 << 19, 1 << 16}} {
		loop := d.loop(9 << 20)
		want := append(slices.Clone(d.image), d.content(loop)[len(d.image):]...)
		for _, e := range d.ranges {
			copy(want[e.Offset:e.End()], d.content(loop)[e.Offset:e.End()])
		}
		_, err := Restore(t.Context(), d.store, Options{Device: d.device, Target: loop, Changes: ChangesAll, Force: true, limits: lim})
		d.mustName(err, d.ranges)
		if !errors.Is(err, ErrIncomplete) || strings.Contains(err.Error(), "\n") {
			t.Errorf("the error is no single line that says the target is incomplete: %v", err)
		}
		d.same("the target", d.content(loop), want)
	}
	var out bytes.Buffer
	_, err := Dump(t.Context(), d.store, &out, DumpOptions{Device: d.device, limits: limits{1 << 10, 1 << 10, 1 << 20, 0}})
	if !errors.Is(err, layer.ErrDamaged) {
		t.Errorf("dump: %v", err)
	}
	d.same("what was dumped", out.Bytes(), d.image[:out.Len()])
	if int64(out.Len()) > d.ranges[0].Offset {
		t.Errorf("%d bytes came out, the first %d are good", out.Len(), d.ranges[0].Offset)
	}
}

func TestAnotherCopyOfADamagedBlobServes(t *testing.T) {
	for name, harm := range map[string]func(d *damaged){
		"flipped byte": (*damaged).flip,
		"missing pack": func(d *damaged) { d.must(os.Remove(d.packFile())) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDamaged(t)
			// All blobs of the pack again, by somebody who does not know the index.
			other := d.reopen()
			w := other.NewWriter(t.Context(), repo.WriterOptions{})
			var blobs []repo.BlobHandle
			d.must(d.repo.EachBlob(t.Context(), func(h repo.BlobHandle, l repo.Location) error {
				if l.Pack == d.where.Pack {
					blobs = append(blobs, h)
				}
				return nil
			}))
			for _, h := range blobs {
				plain, err := d.repo.LoadBlob(t.Context(), h, repo.KindData)
				d.must(err)
				_, err = w.SaveBlob(t.Context(), repo.KindData, plain)
				d.must(err)
			}
			d.must(w.Flush(t.Context()))
			harm(d)
			d.must(d.repo.LoadIndex(t.Context()))
			if n := len(d.repo.Locations(dataBlob(d.blob))); n != 2 {
				t.Fatalf("the blob is in %d places", n)
			}
			file := d.newFile()
			d.restore(Options{Device: d.device, Target: file, Verify: true})
			d.same("the file", d.content(file), d.image)
		})
	}
}

func TestDamageInMetadataIsRefusedBeforeTheTargetIsTouched(t *testing.T) {
	t.Run("missing pack", func(t *testing.T) {
		d := newDamaged(t)
		d.must(os.Remove(d.packFile()))
		d.mustName(d.refused(d.device), d.ofPack())
	})
	t.Run("truncated pack", func(t *testing.T) {
		d := newDamaged(t)
		d.must(os.Chmod(d.packFile(), 0o600))
		d.must(os.Truncate(d.packFile(), int64(d.where.Offset)+int64(d.where.Length)-1))
		if err := d.refused(d.device); !errors.Is(err, layer.ErrDamaged) {
			t.Error(err)
		}
	})
	t.Run("missing index", func(t *testing.T) {
		d := newDamaged(t)
		files, err := filepath.Glob(filepath.Join(d.dir, "index", "*"))
		d.must(err)
		for _, f := range files {
			d.must(os.Remove(f))
		}
		d.must(d.repo.LoadIndex(t.Context()))
		if err := d.refused(d.device); !errors.Is(err, repo.ErrBlobNotFound) {
			t.Error(err)
		}
	})
	t.Run("blob dropped from the data file", func(t *testing.T) {
		d := newDamaged(t)
		layers := slices.Clone(d.layers)
		layers[0] = d.rewriteData(layers[0], func(data *repo.Node) {
			size, ok := d.repo.BlobSize(dataBlob(data.Content[0]))
			if !ok {
				t.Fatal("the blob is not there")
			}
			data.Content, data.Size = data.Content[1:], data.Size-uint64(size)
		})
		// The manifest names the tree as it was.
		if _, err := d.forge(layers); !errors.Is(err, layer.ErrDamaged) {
			t.Errorf("a tree that the manifest does not name: %v", err)
		}
		// Even if it named the new one.
		if err := d.refused(d.name(layers)); !errors.Is(err, layer.ErrDamaged) {
			t.Error(err)
		}
	})
	t.Run("layer replaced by an empty tree", func(t *testing.T) {
		d := newDamaged(t)
		layers := slices.Clone(d.layers)
		empty := d.saveTree()
		layers[1] = layer.DirNode(layers[1].Name, empty, layers[1].ModTime)
		if err := d.refused(d.name(layers)); !errors.Is(err, layer.ErrDamaged) {
			t.Error(err)
		}
	})
	t.Run("first layer gone", func(t *testing.T) {
		d := newDamaged(t)
		size := int64(len(d.image))
		d.mustName(d.refused(d.name(d.layers[1:])), []kernel.Extent{{Length: 3 << 20}, {Offset: 5 << 20, Length: size - 5<<20}})
	})
	t.Run("part gone", func(t *testing.T) {
		d := newDamaged(t)
		l := d.backup(1, kernel.Extent{Length: int64(len(d.image))})
		tree := d.resplit(*d.layers[2].Subtree, 8)
		d.must(d.w.Flush(t.Context()))
		parts, err := d.repo.LoadTree(t.Context(), tree)
		d.must(err)
		if len(parts.Nodes) < 2 {
			t.Fatal("the layer was not cut")
		}
		one := d.saveTree(parts.Nodes[1:]...)
		err = d.refused(d.name([]*repo.Node{layer.DirNode(d.layers[2].Name, one, d.layers[2].ModTime)}))
		if !errors.Is(err, layer.ErrDamaged) {
			t.Error(err)
		}
		d.restore(Options{Device: l.device, Target: d.newFile(), Verify: true})
	})
}

// ofPack is the ranges that need any blob of the harmed pack.
func (d *damaged) ofPack() (out []kernel.Extent) {
	d.Helper()
	c, err := openChain(d.Context(), d.store, d.device)
	d.must(err)
	d.must(c.walk(d.Context(), false, func(id repo.ID, s segment) error {
		if d.repo.Locations(dataBlob(id))[0].Pack == d.where.Pack {
			out = append(out, s.extent())
		}
		return nil
	}, nil))
	return kernel.Align(out, int64(len(d.image)))
}

// rewriteData stores a layer of one part whose data file was changed.
func (d *damaged) rewriteData(l *repo.Node, change func(data *repo.Node)) *repo.Node {
	d.Helper()
	part, files := d.files(*l.Subtree)
	change(files.Find("data"))
	p := layer.DirNode(part.Name, d.saveTree(files.Nodes...), part.ModTime)
	return layer.DirNode(l.Name, d.saveTree(p), l.ModTime)
}

// forge names layers in a snapshot whose manifest is of others.
func (d *damaged) forge(layers []*repo.Node) ([]snapshot.Device, error) {
	d.Helper()
	_, sn, err := d.repo.FindSnapshot(d.Context(), d.device.Snapshot.String(), repo.SnapshotFilter{})
	d.must(err)
	id := sn.Tree
	for _, name := range strings.Split(strings.Trim(deviceName, "/"), "/") {
		tree, err := d.repo.LoadTree(d.Context(), *id)
		d.must(err)
		id = tree.Find(name).Subtree
	}
	folder, err := d.repo.LoadTree(d.Context(), *id)
	d.must(err)
	old := folder.Find("layers")
	return d.trySnapshot(d.saveTree(folder.Find("device.json"), layer.DirNode("layers", d.saveTree(layers...), old.ModTime)))
}

// flipIn changes a byte of a blob in each pack that has it.
func (f *fixture) flipIn(h repo.BlobHandle) {
	f.Helper()
	for _, l := range f.repo.Locations(h) {
		name := l.Pack.String()
		path := filepath.Join(f.dir, "data", name[:2], name)
		f.must(os.Chmod(path, 0o600))
		b, err := os.ReadFile(path)
		f.must(err)
		b[int(l.Offset)+f.rnd.IntN(int(l.Length))] ^= 1
		f.must(os.WriteFile(path, b, 0o600))
	}
}

// unlist takes a blob out of the index, as `repair index` does with what is lost.
func (f *fixture) unlist(h repo.BlobHandle) {
	f.Helper()
	packs := map[repo.ID]bool{}
	for _, l := range f.repo.Locations(h) {
		packs[l.Pack] = true
	}
	var without []repo.IndexPack
	files, err := f.repo.ListFiles(f.Context(), backend.IndexFile)
	f.must(err)
	for id := range files {
		list, err := f.repo.LoadIndexFile(f.Context(), id)
		f.must(err)
		for _, p := range list {
			if packs[p.ID] {
				p.Blobs = slices.DeleteFunc(p.Blobs, func(b repo.BlobLocation) bool { return b.Handle == h })
				without = append(without, p)
			}
		}
	}
	_, err = f.repo.RewriteIndex(f.Context(), repo.IndexRewrite{
		Drop: func(id repo.ID) bool { return packs[id] },
		Add: func(_ context.Context, add func(repo.IndexPack) error) error {
			for _, p := range without {
				if err := add(p); err != nil {
					return err
				}
			}
			return nil
		},
	})
	f.must(err)
	f.must(f.repo.LoadIndex(f.Context()))
}

// Of a device of which metadata are lost, all can be had but the ranges that these describe,
// check and restore name the same ones, and without Salvage nothing is touched.
func TestLostMetadataTakeOnlyTheirOwnRanges(t *testing.T) {
	tree := func(id *repo.ID) repo.BlobHandle { return repo.BlobHandle{Type: repo.TreeBlob, ID: *id} }
	content := func(d *damaged, layer, part int, name string) repo.BlobHandle {
		_, files := d.part(layer, part)
		return dataBlob(files.Find(name).Content[0])
	}
	for name, pick := range map[string]func(*damaged) (repo.BlobHandle, []kernel.Extent){
		"newer layer": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			return tree(d.layers[1].Subtree), []kernel.Extent{{Length: int64(len(d.image))}}
		},
		"older layer": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			return tree(d.layers[0].Subtree), d.older(0, int64(len(d.image)))
		},
		"part of the newer layer": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			node, _ := d.part(1, 0)
			return tree(node.Subtree), []kernel.Extent{{Length: int64(len(d.image))}}
		},
		"first part": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			node, _ := d.part(0, 0)
			return tree(node.Subtree), d.older(0, d.starts(0)[1])
		},
		"block index in the middle": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			i := len(d.starts(0)) / 2
			return content(d, 0, i, "index"), d.older(d.starts(0)[i], append(d.starts(0), int64(len(d.image)))[i+1])
		},
		"last block index": func(d *damaged) (repo.BlobHandle, []kernel.Extent) {
			i := len(d.starts(0)) - 1
			return content(d, 0, i, "index"), d.older(d.starts(0)[i], int64(len(d.image)))
		},
		"sums": func(d *damaged) (repo.BlobHandle, []kernel.Extent) { return content(d, 1, 0, "sums"), nil },
	} {
		ways := map[string]func(*fixture, repo.BlobHandle){"flipped": (*fixture).flipIn, "in no index": (*fixture).unlist}
		for how, lose := range ways { // in no order: any one will do
			if !soak() {
				maps.DeleteFunc(ways, func(other string, _ func(*fixture, repo.BlobHandle)) bool { return other != how && name != "sums" })
			}
			t.Run(name+" "+how, func(t *testing.T) {
				d := newDamaged(t)
				d.cutFirst()
				blob, lost := pick(d)
				lose(d.fixture, blob)
				d.mustGive(lost)
				if name != "sums" {
					return
				}
				_, err := Restore(t.Context(), d.store, Options{Device: d.device, Target: d.newFile(), Verify: true})
				if !errors.Is(err, layer.ErrDamaged) && !errors.Is(err, repo.ErrDamaged) {
					t.Errorf("verified without sums: %v", err)
				}
			})
		}
	}
	t.Run("data in no index", func(t *testing.T) {
		d := newDamaged(t)
		d.unlist(dataBlob(d.blob))
		d.mustGive(d.ranges)
	})
}

// cutFirst cuts the older layer into parts, and makes a snapshot of that.
func (d *damaged) cutFirst() {
	d.Helper()
	cut := d.resplit(*d.layers[0].Subtree, 8)
	d.layers[0] = layer.DirNode(d.layers[0].Name, cut, d.layers[0].ModTime)
	d.device = d.name(d.layers)
	if len(d.starts(0)) < 4 {
		d.Fatalf("the layer was cut at %v", d.starts(0))
	}
}

// part is a part of a layer, and its files.
func (d *damaged) part(layer, i int) (*repo.Node, *repo.Tree) {
	d.Helper()
	l, err := d.repo.LoadTree(d.Context(), *d.layers[layer].Subtree)
	d.must(err)
	files, err := d.repo.LoadTree(d.Context(), *l.Nodes[i].Subtree)
	d.must(err)
	return l.Nodes[i], files
}

// starts is where a layer's parts begin.
func (d *damaged) starts(layer int) (out []int64) {
	d.Helper()
	l, err := d.repo.LoadTree(d.Context(), *d.layers[layer].Subtree)
	d.must(err)
	for _, n := range l.Nodes {
		at, err := strconv.ParseInt(n.Name, 16, 64)
		d.must(err)
		out = append(out, at)
	}
	return out
}

// older is what the newer layer, which has the bytes from 3 to 5 MiB, leaves of a range.
func (d *damaged) older(from, to int64) (out []kernel.Extent) {
	for _, e := range []kernel.Extent{{Offset: from, Length: min(to, 3<<20) - from}, {Offset: max(from, 5<<20), Length: to - max(from, 5<<20)}} {
		if e.Length > 0 {
			out = append(out, e)
		}
	}
	return out
}

// mustGive makes sure that everything can be had but the given ranges, in each way there is.
func (d *damaged) mustGive(lost []kernel.Extent) {
	d.Helper()
	if len(lost) > 0 {
		d.mustName(d.refused(d.device), lost)
	}
	_, sn, err := d.repo.FindSnapshot(d.Context(), d.device.Snapshot.String(), repo.SnapshotFilter{})
	d.must(err)
	var found check.Finding
	_, err = check.Devices(d.Context(), d.store, check.Options{
		Snapshots: map[repo.ID]*repo.Snapshot{d.device.Snapshot: sn},
		Touched:   map[repo.ID]error{d.device.Snapshot: errors.New("harmed")},
		Blob: func(h repo.BlobHandle) error {
			_, err := d.repo.LoadBlob(d.Context(), h, repo.KindData)
			return err
		},
		Report: func(f check.Finding) { found = f },
	})
	d.must(err)
	if len(found.Causes) == 0 || !slices.Equal(found.Ranges, append([]kernel.Extent{}, lost...)) {
		d.Errorf("check finds %v, lost are %v", found, lost)
	}
	told := func(err error) {
		d.Helper()
		if len(lost) > 0 {
			d.mustName(err, lost)
		} else {
			d.must(err)
		}
	}
	for _, how := range []Changes{ChangesAll, ChangesCompare} {
		loop := d.loop(9 << 20)
		want := append(slices.Clone(d.image), d.content(loop)[len(d.image):]...)
		for _, e := range lost {
			copy(want[e.Offset:e.End()], d.content(loop)[e.Offset:e.End()])
		}
		_, err := Restore(d.Context(), d.store, Options{Device: d.device, Target: loop, Changes: how, Force: true, Salvage: true})
		told(err)
		d.same(string(how), d.content(loop), want)
	}
	want := slices.Clone(d.image)
	var out bytes.Buffer
	_, err = Dump(d.Context(), d.store, &out, DumpOptions{Device: d.device, Salvage: true})
	told(err)
	for _, e := range lost { // zeros, or what a blob has of a block that it shares with a lost one
		for i := e.Offset; i < min(e.End(), int64(out.Len())); i++ {
			if out.Bytes()[i] == 0 {
				want[i] = 0
			}
		}
	}
	d.same("the dump", out.Bytes(), want)
}
