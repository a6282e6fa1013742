// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// cutScript writes, backs up, and now and then puts the history away and takes it up
// again, for as long as there is power.
const cutScript = `
while :; do
  dd if=/dev/urandom of=$DEVICE bs=4k seek=$((3072 + RANDOM % 900)) count=$((1 + RANDOM % 40)) conv=notrunc,fsync 2>/dev/null
  dsync-backup -q backup $DEVICE --name /dev/scene
  echo backup
  if [ $((RANDOM % 2)) = 0 ]; then
    dd if=/dev/urandom of=$DEVICE bs=4k seek=$((3072 + RANDOM % 900)) count=3 conv=notrunc,fsync 2>/dev/null
    dsync-backup -q track stop --save $RAW && echo saved && dsync-backup -q track start $RAW $FLAGS && echo started
  fi
done
`

// TestPowerCutsAnywhere cuts the power at random moments of writing, backing up, stopping
// and starting. After the next boot the device is tracked again, whatever there is,
// and each backup is what the device holds.
func TestPowerCutsAnywhere(t *testing.T) {
	cuts := 5 // of each kind
	if soak() {
		cuts = 25
	}
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	for i, kind := range []string{"dm", "bpf"} {
		t.Run(kind, func(t *testing.T) {
			Turn(t, i, func(t *testing.T, k Kernel) {
				r := rand.New(rand.NewPCG(seed, uint64(i)))
				s := newScene(t, k, kind)
				s.begin(s.Device("data"), "/dev/scene")
				for n := range cuts {
					env := append(s.in()[1:5:5], "DEVICE="+s.device(), "RAW="+s.raw, "FLAGS=--tracker bpf")
					if kind == "dm" {
						env[len(env)-1] = "FLAGS=--tracker dm --as scene"
					}
					p := s.Machine.Start(Command{Args: []string{"sh", "-c", cutScript}, Env: env[:len(env):len(env)]})
					// Nothing is waited for: any moment will do.
					time.Sleep(time.Duration(r.Int64N(int64(8 * time.Second))))
					s.reboot(true)
					did := p.Wait()
					s.start()
					sum := s.round()
					t.Logf("cut %d after %q: %s %s", n, did.Stdout, sum.Changes, sum.FallbackReason)
					s.write()
					if sum = s.backup(); sum.Changes != "tracker" {
						t.Errorf("cut %d: the second backup after it: %s, because %q", n, sum.Changes, sum.FallbackReason)
					}
				}
				// Of a backup that was cut off, whose process number another one may have by now.
				s.Run(s.in("unlock", "--remove-all")...)
				s.Run(s.in("check")...)
			})
		})
	}
}
