// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
)

// running is a command in the background.
type running struct {
	cmd       *exec.Cmd
	out, errs bytes.Buffer
	done      chan struct{}
}

func (e *env) start(args ...string) *running { return e.startProgram(dsync, args...) }

func (e *env) startProgram(path string, args ...string) *running {
	e.t.Helper()
	r := &running{cmd: e.prepare(path, args...), done: make(chan struct{})}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.errs
	if err := r.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	go func() {
		_ = r.cmd.Wait() // how it ended is in ProcessState
		close(r.done)
	}()
	return r
}

func (r *running) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// result waits for the end.
func (r *running) result() result {
	<-r.done
	return result{r.cmd.ProcessState.ExitCode(), r.out.String(), r.errs.String()}
}

// until waits until something is so in the middle of the command.
func (r *running) until(t testing.TB, what string, so func() bool) {
	t.Helper()
	wait(t, what, func() bool {
		if r.ended() {
			t.Fatalf("the command ended before %s: %+v", what, r.result())
		}
		return so()
	})
}

// largestPack is the pack that holds the most, and so data.
func (e *env) largestPack() string {
	e.t.Helper()
	var largest string
	var size int64
	for _, p := range e.files("data") {
		if fi, err := os.Stat(p); err == nil && fi.Size() > size {
			largest, size = p, fi.Size()
		}
	}
	return largest
}

func move(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestDamageInTheRepositoryIsNamed(t *testing.T) {
	e := lightEnv(t)
	c := newContent(random(t), false)
	img := image(t, c, 40<<20)
	e.backup(img, "--pack-size", "4")
	const ranges = `restore to .*: it cannot give bytes \d+ to \d+[^:]*: .*pack `

	// A flipped byte.
	pack := e.largestPack()
	good, err := os.ReadFile(pack)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 0x10
	rewrite(t, pack, bad)
	// What is not damaged is there all the same.
	target := filepath.Join(t.TempDir(), "x")
	said(t, e.try("-q", "restore", "latest", target), false, false, 1, ranges+".*damaged.* the target is incomplete")
	damaged(t, e)
	if n := differ(t, img, target); n == 0 || n > len(bad)*2 {
		t.Errorf("%d bytes of the restored image are not as they were, a pack of %d is damaged", n, len(bad))
	}
	rewrite(t, pack, good)

	// A missing pack, which shows before anything is written.
	aside := filepath.Join(t.TempDir(), "aside")
	move(t, pack, aside)
	e.fails(1, ranges+".*missing", "restore", "latest", target+"1")
	if _, err := os.Stat(target + "1"); err == nil {
		t.Errorf("a restore that cannot succeed has begun to write")
	}
	damaged(t, e)
	move(t, aside, pack)

	// A truncated index. What is cached is not asked for again, so without.
	index := e.files("index")[0]
	whole, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	rewrite(t, index, whole[:len(whole)/2])
	for _, args := range [][]string{{"restore", "latest", target + "2"}, {"backup", img}} {
		e.fails(1, "index "+filepath.Base(index)[:8]+".*damaged in the repository", append([]string{"--no-cache"}, args...)...)
	}
	// What is listed is in the snapshots themselves.
	if r := e.try("--no-cache", "snapshots"); r.code != 0 || !strings.Contains(r.stdout, e.snapshotIDs()[0][:8]) ||
		!strings.Contains(r.stderr, "warning: going on without an index file: load index "+filepath.Base(index)[:8]) {
		t.Errorf("snapshots beside a damaged index: %+v", r)
	}
	damaged(t, e)
	rewrite(t, index, whole)

	// A truncated snapshot.
	sn := e.files("snapshots")[0]
	if whole, err = os.ReadFile(sn); err != nil {
		t.Fatal(err)
	}
	rewrite(t, sn, whole[:20])
	e.fails(1, "snapshot "+filepath.Base(sn)[:8]+".*damaged", "--no-cache", "restore", filepath.Base(sn), target+"3")
	rewrite(t, sn, whole)

	// Nothing was lost meanwhile.
	e.check()
	same(t, img, e.restored("latest"))
}

// rewrite replaces a file of the repository, which is read-only.
func rewrite(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", content, 0o400); err != nil {
		t.Fatal(err)
	}
	move(t, path+".new", path)
}

// damaged has stock restic find the damage too.
func damaged(t testing.TB, e *env) {
	t.Helper()
	if r := finish(t, e.prepare(restics["0.18"], "check", "--read-data", "--no-cache")); r.code == 0 {
		t.Errorf("stock restic finds no damage: %s", r.stdout)
	}
}

// differ counts the bytes of b that are not those of a.
func differ(t testing.TB, a, b string) (n int) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(x) != len(y) {
		t.Fatalf("%s has %d bytes, %s %d", a, len(x), b, len(y))
	}
	for i := range x {
		if x[i] != y[i] {
			n++
		}
	}
	return n
}

func TestAFullDiskFailsTheBackupAndLosesNothing(t *testing.T) {
	small := newDisk(t, 96<<20)
	small.mkfs("ext4")
	e := newEnv(t, filepath.Join(small.mnt, "repo"))
	e.initLight()
	c := newContent(random(t), false)
	d := newDisk(t, 160<<20)
	f := direct(t, d.path)
	fillRange(t, f, c, 0, 8<<20)
	d.track(e)
	first := e.backup(d.path)
	was := filepath.Join(t.TempDir(), "was.img")
	d.copyTo(was)

	ballast := filepath.Join(small.mnt, "ballast")
	run(t, "fallocate", "-l", "50M", ballast)
	fillRange(t, f, c, 4<<20, 44<<20)
	e.fails(1, "no space left on device", "backup", d.path)
	if n := len(e.files("snapshots")); n != 1 {
		t.Errorf("%d snapshots, want 1", n)
	}
	if locks := e.files("locks"); len(locks) > 0 {
		t.Errorf("locks are left: %v", locks)
	}
	same(t, was, e.restored(first.SnapshotID.String()))

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	e.check()
	fillRange(t, f, c, 100<<20, 1<<20)
	if s := e.backup(d.path); s.Changes != "tracker" || s.BytesRead > tenthMore(45<<20) {
		t.Errorf("the next backup is from %s (%s) and reads %d", s.Changes, s.FallbackReason, s.BytesRead)
	}
	same(t, d.file, e.restored("latest"))
	e.check()
}

// objects counts what is in a bucket below a prefix.
func objects(t testing.TB, s *miniotest.Server, bucket, prefix string) (n int) {
	t.Helper()
	for o := range s.Client().ListObjects(context.Background(), bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		n++
	}
	return n
}

// slowly throttles an upload, so that something can happen in the middle.
var slowly = []string{"--limit-upload", "4096", "--pack-size", "4", "--retry-store", "3s"}

func TestAStoreThatGoesAwayInMidBackup(t *testing.T) {
	s := miniotest.Start(t)
	s.MakeBucket("backups")
	e := newEnv(t, s.Location("backups", "repo"), s.Environ()...)
	s.Setenv(t)
	e.initLight()
	c := newContent(random(t), false)
	d := newDisk(t, 160<<20)
	f := direct(t, d.path)
	fillRange(t, f, c, 0, 8<<20)
	d.track(e)
	e.backup(d.path)
	fillRange(t, f, c, 4<<20, 24<<20)

	t.Run("ServerStops", func(t *testing.T) {
		before := objects(t, s, "backups", "repo/data/")
		b := e.start(append(slowly, "-q", "backup", d.path)...)
		b.until(t, "the first packs are stored", func() bool { return objects(t, s, "backups", "repo/data/") > before+1 })
		s.Stop()
		said(t, b.result(), false, true, 1, "connect to "+s.Host+".*tried")
		said(t, e.try("-q", "backup", d.path, "--retry-store", "1s"), false, true, 1, "connect to "+s.Host)
		s.Restart()
		// The lock of the process that could not remove it is in nobody's way.
		if sum := e.backup(d.path); sum.Changes != "tracker" {
			t.Errorf("the next backup is from %s: %s", sum.Changes, sum.FallbackReason)
		}
		same(t, d.file, e.restored("latest"))
		e.must("unlock")
		e.check()
	})
	t.Run("ServerComesBack", func(t *testing.T) {
		fillRange(t, f, c, 64<<20, 16<<20)
		before := objects(t, s, "backups", "repo/data/")
		b := e.start("--limit-upload", "4096", "--pack-size", "4", "-q", "backup", d.path)
		b.until(t, "the first packs are stored", func() bool { return objects(t, s, "backups", "repo/data/") > before })
		s.Stop()
		s.Restart()
		if r := b.result(); r.code != 0 {
			t.Fatalf("a server that was away for a moment fails the backup: %+v", r)
		}
		same(t, d.file, e.restored("latest"))
		e.check()
	})
	t.Run("BucketRemoved", func(t *testing.T) {
		fillRange(t, f, c, 100<<20, 24<<20)
		before := objects(t, s, "backups", "repo/data/")
		b := e.start(append(slowly, "--json", "backup", d.path)...)
		b.until(t, "the first packs are stored", func() bool { return objects(t, s, "backups", "repo/data/") > before })
		s.RemoveBucket("backups")
		r := b.result()
		said(t, r, true, true, 1, `bucket "backups" does not exist`)
		e.fails(10, "no repository", "backup", d.path)
		// The tracker knows all the same what was written.
		if st := e.tracked(d); !st.Reliable {
			t.Errorf("the tracker is not reliable any more: %s", st.Reason)
		}
		s.MakeBucket("backups")
		e.fails(10, "no repository", "backup", d.path)
		e.initLight()
		if sum := e.backup(d.path); sum.Changes != "full" {
			t.Errorf("a backup to an empty repository is from %s", sum.Changes)
		}
		same(t, d.file, e.restored("latest"))
	})
	t.Run("WrongKey", func(t *testing.T) {
		bad := *e
		bad.vars = append(append([]string{}, e.vars...), "AWS_SECRET_ACCESS_KEY=wrong")
		bad.fails(1, "secret key .* is wrong, check AWS_SECRET_ACCESS_KEY", "backup", d.path)
		bad.vars = append(append([]string{}, e.vars...), "AWS_ACCESS_KEY_ID=nobody")
		bad.fails(1, `access key ID "nobody" is not known`, "backup", d.path)
		e.fails(10, "no repository", "-r", s.Location("other", ""), "snapshots")
	})
}

func TestAnInterruptedBackupUnlocksAndLosesNothing(t *testing.T) {
	e := lightEnv(t)
	c := newContent(random(t), false)
	d := newDisk(t, 128<<20)
	f := direct(t, d.path)
	fillRange(t, f, c, 0, 8<<20)
	d.track(e)
	e.backup(d.path)
	for i, how := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		fillRange(t, f, c, int64(i)*32<<20, 24<<20)
		before := len(e.files("data"))
		args := append([]string{"-q", "backup", d.path}, slowly...)
		if i == 1 {
			args = append(args, "--json")
		}
		b := e.start(args...)
		b.until(t, "the first pack is stored", func() bool { return len(e.files("data")) > before })
		if err := b.cmd.Process.Signal(how); err != nil {
			t.Fatal(err)
		}
		said(t, b.result(), i == 1, false, 130, "interrupted")
		if locks := e.files("locks"); len(locks) > 0 {
			t.Errorf("%v: locks are left: %v", how, locks)
		}
		if n := len(e.files("snapshots")); n != i+1 {
			t.Errorf("%v: %d snapshots, want %d", how, n, i+1)
		}
		e.restic("0.18", "check")
		if s := e.backup(d.path); s.Changes != "tracker" {
			t.Errorf("%v: the next backup is from %s: %s", how, s.Changes, s.FallbackReason)
		}
		same(t, d.file, e.restored("latest"))
	}
	// restic's unlock asks a lock's process by SIGHUP whether it is there.
	fillRange(t, f, c, 96<<20, 12<<20)
	b := e.start(append([]string{"-q", "backup", d.path}, slowly...)...)
	b.until(t, "the lock is there", func() bool { return len(e.files("locks")) > 0 })
	e.restic("0.18", "unlock")
	if n := len(e.files("locks")); n != 1 {
		t.Errorf("restic's unlock leaves %d locks of a live process", n)
	}
	if r := b.result(); r.code != 0 {
		t.Errorf("restic's unlock ends a backup: %+v", r)
	}
	e.check()
	if locks := e.files("locks"); len(locks) > 0 {
		t.Errorf("locks are left: %v", locks)
	}
}
