// SPDX-License-Identifier: BSD-2-Clause

package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	restTime  = 3500 * time.Millisecond // without a slow probe
	restLimit = 20 * time.Millisecond   // what is slow, if the disk is not always
	restPause = 20 * time.Millisecond   // between probes
	restMost  = time.Minute
)

// AwaitRest waits until the disk beneath dir is at rest. After heavy work, reading too, a
// disk may make small writes wait for seconds, in bursts: a virtual one while its host writes
// out what it holds, or until it has credit again; one of its own while it tidies up. Whoever
// comes next would pay for that, and the quickest the most. At rest is a disk that took no
// durable write of 4 KiB longer than restLimit, or than four times what it usually takes, for
// restTime. It says false if the disk is not within a minute.
func AwaitRest(ctx context.Context, dir string) (rested bool, err error) {
	var took []time.Duration
	start := time.Now()
	for quiet := start; time.Since(quiet) < restTime; {
		if time.Since(start) > restMost {
			return false, nil
		}
		t, err := probe(filepath.Join(dir, "probe"))
		if err != nil {
			return false, err
		}
		took = append(took, t)
		usual := slices.Sorted(slices.Values(took))[len(took)/2]
		if t > max(restLimit, 4*usual) {
			quiet = time.Now()
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(restPause):
		}
	}
	return true, nil
}

// probe makes a small file durable and removes it, and says how long the first took.
func probe(path string) (took time.Duration, err error) {
	began := time.Now()
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	_, err = f.Write(make([]byte, 4096))
	err = errors.Join(err, f.Sync(), f.Close())
	took = time.Since(began)
	return took, errors.Join(err, os.Remove(path))
}
