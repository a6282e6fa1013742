// SPDX-License-Identifier: BSD-2-Clause

package contender

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/dsync-backup/dsync-backup/bench/host"
	"github.com/dsync-backup/dsync-backup/bench/result"
)

// rsync updates an image file through a pipe, as it would through ssh: the
// receiver is a process of its own, whose cost is told apart.
type rsync struct {
	base
	whole bool
}

func newRsync(b base) (Contender, error) {
	if b.lab.Rsync == "" {
		return nil, fmt.Errorf("rsync: %w", ErrMissing)
	}
	return &rsync{b, b.name == "rsync whole file"}, nil
}

func (r *rsync) target() string { return filepath.Join(r.dir, "image") }

func (r *rsync) Sync(ctx context.Context, row *result.Row) error {
	costFile := filepath.Join(r.dir, "receiver.json")
	args := []string{r.lab.Rsync, "--copy-devices", "--ignore-times", "--fsync", "--stats", "-e", r.lab.Self + " receiver"}
	if r.whole {
		args = append(args, "--whole-file")
	} else {
		args = append(args, "--inplace", "--no-whole-file")
	}
	args = append(args, r.lab.Disk.Path, "localhost:"+r.target())
	cost, err := r.run(ctx, host.Command{Args: args, Env: []string{receiverEnv + "=" + costFile}}, row)
	if err != nil {
		return err
	}
	if row.Sent, err = rsyncSent(string(cost.Stdout)); err != nil {
		return err
	}
	b, err := os.ReadFile(costFile)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &row.OtherCPU); err != nil {
		return err
	}
	row.SourceCPU = max(0, row.SourceCPU-row.OtherCPU)
	return nil
}

func (r *rsync) Verify(ctx context.Context) error { return compare(ctx, r.lab.Disk, r.target()) }

var sentLine = regexp.MustCompile(`(?m)^Total bytes (?:sent|received): ([0-9,.]+)$`)

// rsyncSent is what went over the pipe, both ways.
func rsyncSent(stats string) (int64, error) {
	m := sentLine.FindAllStringSubmatch(stats, -1)
	if len(m) != 2 {
		return 0, fmt.Errorf("rsync's statistics are not understood: %q", stats)
	}
	var sum int64
	for _, x := range m {
		n, err := strconv.ParseInt(strings.NewReplacer(",", "", ".", "").Replace(x[1]), 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

const receiverEnv = "DSYNC_BENCH_RECEIVER"

// Receiver is what rsync runs in place of ssh: it runs the command here, and
// leaves its CPU seconds in a file.
func Receiver(args []string) int {
	for len(args) > 0 && (args[0] == "localhost" || args[0] == "-l") {
		args = args[1:]
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var used float64
	if s := cmd.ProcessState; s != nil {
		used = (s.UserTime() + s.SystemTime()).Seconds()
	}
	// What this process itself used is of the measuring, not of rsync.
	var own syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &own) == nil {
		used += float64(own.Utime.Nano()+own.Stime.Nano()) / 1e9
	}
	b, _ := json.Marshal(used)
	if werr := os.WriteFile(os.Getenv(receiverEnv), b, 0o600); err != nil || werr != nil {
		fmt.Fprintln(os.Stderr, "receiver:", err, werr)
		return 1
	}
	return 0
}

// plainCopy copies everything.
type plainCopy struct{ base }

func (c *plainCopy) target() string { return filepath.Join(c.dir, "image") }

func (c *plainCopy) Sync(ctx context.Context, row *result.Row) error {
	_, err := c.run(ctx, host.Command{Args: []string{"dd", "if=" + c.lab.Disk.Path, "of=" + c.target(), "bs=1M", "iflag=direct", "oflag=direct", "conv=notrunc,fsync", "status=none"}}, row)
	if err != nil {
		return err
	}
	row.Sent, err = host.Size(c.target())
	row.Stored = row.Sent
	return err
}

func (c *plainCopy) Verify(ctx context.Context) error { return compare(ctx, c.lab.Disk, c.target()) }
