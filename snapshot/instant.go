// SPDX-License-Identifier: BSD-2-Clause

package snapshot

import (
	"context"
	"time"
)

// Still is the Instant of a device that stands still by itself, or of one that
// does not and of which no point in time is asked.
type Still PointInTime

// Kind implements Instant.
func (s Still) Kind() PointInTime { return PointInTime(s) }

// Begin implements Instant.
func (s Still) Begin(ctx context.Context) (context.Context, error) { return ctx, nil }

// End implements Instant.
func (s Still) End() (time.Duration, error) { return 0, nil }
