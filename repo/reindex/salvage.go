// SPDX-License-Identifier: BSD-2-Clause

package reindex

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/dsync-backup/dsync-backup/repo"
)

// salvage stores anew what is intact of the packs whose header is lost, as far as an
// index that can be read says where it lies. They are not listed any more: programs
// that prune ask that a pack is as long as its entries say, and restic that its
// header can be read. Nothing has been deleted so far.
func (x *run) salvage(ctx context.Context) error {
	if len(x.sum.PacksBad) == 0 {
		return nil
	}
	slices.SortFunc(x.sum.PacksBad, repo.ID.Compare)
	entries, err := x.entries(ctx)
	if err != nil {
		return err
	}
	w := x.repo.NewWriter(ctx, repo.WriterOptions{})
	defer w.Abort()
	for _, id := range x.sum.PacksBad {
		if err := x.salvagePack(ctx, w, id, entries[id]); err != nil {
			return err
		}
	}
	return w.Flush(ctx)
}

// entries are what the indexes list of the packs that are bad.
func (x *run) entries(ctx context.Context) (map[repo.ID][]repo.BlobLocation, error) {
	out := map[repo.ID][]repo.BlobLocation{}
	for _, id := range x.sum.PacksBad {
		out[id] = nil
	}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, min(4, x.repo.Backend().Connections())))
	for _, id := range x.good {
		g.Go(func() error {
			packs, err := x.repo.LoadIndexFile(gctx, id)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			for _, p := range packs {
				list, bad := out[p.ID]
				if !bad {
					continue
				}
				for _, b := range p.Blobs {
					if !slices.Contains(list, b) { // several index files may list it
						list = append(list, b)
					}
				}
				out[p.ID] = list
			}
			return nil
		})
	}
	return out, g.Wait()
}

// salvagePack reads each blob: what an index says proves nothing of a pack that is
// not what it was.
func (x *run) salvagePack(ctx context.Context, w *repo.Writer, id repo.ID, entries []repo.BlobLocation) error {
	why := x.why[id]
	if len(entries) == 0 {
		x.say("pack %s cannot be read, and no index says what it holds: it is not listed: %v", id.Str(), why)
		return nil
	}
	rep, err := x.repo.ReadPack(ctx, id, x.read[id], entries)
	if err == nil {
		err = rep.Unread // a store that refuses says nothing of the blobs
	}
	if err != nil {
		return err
	}
	kept := slices.DeleteFunc(entries, func(b repo.BlobLocation) bool { return rep.Bad[b] != nil })
	lost := len(rep.Bad)
	x.sum.BlobsKept += len(kept)
	x.sum.BlobsLost += lost
	text := fmt.Sprintf("%d blobs that an index lists there are intact and stored anew", len(kept))
	if lost > 0 {
		text += fmt.Sprintf(", %d more are lost with it", lost)
	}
	x.say("pack %s is not listed any more, since its header cannot be read; %s: %v", id.Str(), text, why)
	if len(kept) == 0 {
		return nil
	}
	x.sum.PacksSalvaged = append(x.sum.PacksSalvaged, id)
	return w.CopyBlobs(ctx, id, kept, func(h repo.BlobHandle) repo.Kind {
		if h.Type == repo.TreeBlob {
			return repo.KindTree
		}
		return repo.KindData
	}, false)
}
