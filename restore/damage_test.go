// SPDX-License-Identifier: BSD-2-Clause

package restore

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot"
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
