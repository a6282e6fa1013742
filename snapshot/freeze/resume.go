// SPDX-License-Identifier: BSD-2-Clause

package freeze

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel/devmapper"
)

// resume lets devices go on that are suspended: a thaw writes to them, and so
// would wait for ever. A table that was loaded meanwhile is put in place, which
// is what their owner was about to do. One that cannot be resumed is tried
// again, as a thaw is.
func resume(names []string) {
	for _, name := range names {
		for range 50 {
			i, err := devmapper.Stat(name)
			if err == nil && i.Suspended {
				err = devmapper.Resume(context.Background(), name, devmapper.ResumeOptions{NoNode: true})
			}
			if err == nil || errors.Is(err, unix.ENXIO) {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}
