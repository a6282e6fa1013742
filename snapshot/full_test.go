// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/faulty"
)

// standing is an Instant that is told when the device begins to stand still.
type standing struct {
	Still
	begin func()
}

// Begin implements Instant.
func (s *standing) Begin(ctx context.Context) (context.Context, error) {
	s.begin()
	return s.Still.Begin(ctx)
}

// A full backup stores again what is lost, however the device is copied, and has looked for
// that before the device stands still: nothing is listed any more from then on.
func TestAFullBackupStoresAgainWhatIsLost(t *testing.T) {
	const size = 1 << 20
	for name, pre := range map[string]bool{"Copy": false, "Precopy": true} {
		t.Run(name, func(t *testing.T) {
			f, m := newImage(t, size), newMarking(size)
			f.write(0, noise(rand.New(rand.NewPCG(8, 9)), size))
			f.backup(nil)
			largest, most := repo.ID{}, int64(0)
			packs, err := f.r.ListFiles(t.Context(), backend.PackFile)
			if err != nil {
				t.Fatal(err)
			}
			for id, n := range packs {
				if n > most {
					largest, most = id, n
				}
			}
			if err := f.r.Backend().Remove(t.Context(), backend.Handle{Type: backend.PackFile, Name: largest.String()}); err != nil {
				t.Fatal(err)
			}
			store := faulty.New(f.r.Backend())
			if f.r, err = repo.Open(t.Context(), store, "geheim", repo.Options{}); err != nil {
				t.Fatal(err)
			}
			if err := f.r.LoadIndex(t.Context()); err != nil {
				t.Fatal(err)
			}
			s := f.backup(func(o *Options) {
				o.Changes, o.History = ChangesFull, m
				o.Instant = &standing{Still(PointInTimeNone), func() { store.Inject(faulty.Rule{Ops: faulty.List}) }}
				if pre {
					o.Precopy = &Precopy{MaxFreeze: time.Minute}
				}
			})
			store.Heal()
			if s.DataAddedPacked < size*9/10 || !bytes.Equal(f.restored(s.SnapshotID), f.content()) {
				t.Errorf("%d bytes were lost: %+v", most, s)
			}
		})
	}
}
