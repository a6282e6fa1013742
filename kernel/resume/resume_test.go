// SPDX-License-Identifier: BSD-2-Clause

package resume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsync-backup/dsync-backup/kernel"
	"github.com/dsync-backup/dsync-backup/kernel/epochlog"
	"github.com/dsync-backup/dsync-backup/kernel/fingerprint"
	"github.com/dsync-backup/dsync-backup/kernel/trackers"
)

// A child process stops or starts a tracker, and kills itself with SIGKILL when it
// comes to a point.
type childTask struct {
	Verb, Device, State, Point string
}

const envChild = "DSYNC_TEST_CHILD"

func TestMain(m *testing.M) {
	text := os.Getenv(envChild)
	if text == "" {
		os.Exit(m.Run())
	}
	var c childTask
	err := json.Unmarshal([]byte(text), &c)
	if err == nil {
		err = c.run()
	}
	fmt.Fprintln(os.Stderr, "the child came to its end:", err)
	os.Exit(1)
}

func (c childTask) run() error {
	hook := func(point string) {
		if point == c.Point {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	if c.Verb == "start" {
		_, err := Start(context.Background(), c.Device, Options{Options: bpfOnly, StateDir: c.State, hook: hook}, nodes{})
		return err
	}
	t, err := trackers.Open(c.Device)
	if err != nil {
		return err
	}
	_, err = stop(context.Background(), t, c.State, nodes{}, hook)
	return err
}

var bpfOnly = trackers.Options{Kind: trackers.BPF}

// nodes opens devices as this package's users do, through the page cache.
type nodes struct{}

type node struct {
	fingerprint.Source
	*os.File
	size int64
}

func (n node) Size() int64  { return n.size }
func (n node) Path() string { return n.Name() }

func (nodes) Open(path string, exclusive bool) (Device, error) {
	flags := os.O_RDONLY
	if exclusive {
		flags |= unix.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	return node{fingerprint.ReaderAt(f), f, size}, err
}

func (nodes) Identify(context.Context, string) (fingerprint.Identity, error) { return nil, nil }

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// disk is a loop device with an ext4, so large that the sample of a fingerprint
// all but never meets one block.
type disk struct {
	t           *testing.T
	path, state string
}

func newDisk(t *testing.T) *disk {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 4<<30); err != nil {
		t.Fatal(err)
	}
	d := &disk{t, run(t, "losetup", "--find", "--show", file), t.TempDir()}
	t.Cleanup(func() {
		if tr, err := trackers.Open(d.path); err == nil {
			_ = tr.Stop(context.Background())
		}
		_ = exec.Command("losetup", "-d", d.path).Run()
	})
	run(t, "mkfs.ext4", "-q", d.path)
	return d
}

func (d *disk) start() *Started {
	d.t.Helper()
	s, err := Start(d.t.Context(), d.path, Options{Options: bpfOnly, StateDir: d.state}, nodes{})
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

// save stops, and wants the history to be saved.
func (d *disk) save() {
	d.t.Helper()
	if why, err := Stop(d.t.Context(), d.open(), d.state, nodes{}); why != nil || err != nil {
		d.t.Fatalf("not saved: %v, %v", why, err)
	}
}

func (d *disk) open() trackers.Tracker {
	d.t.Helper()
	t, err := trackers.Open(d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	return t
}

// rotate ends an epoch, as a backup does.
func (d *disk) rotate(t trackers.Tracker) kernel.Epoch {
	d.t.Helper()
	s, err := epochlog.Open(d.t.Context(), t, d.state)
	if err != nil {
		d.t.Fatal(err)
	}
	e, err := s.Rotate(d.t.Context())
	if err := errors.Join(err, s.Commit(d.t.Context()), s.Unlock()); err != nil {
		d.t.Fatal(err)
	}
	return e
}

// write writes a block past the file system, and gives its number.
func (d *disk) write() int64 {
	d.t.Helper()
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	i := 300_000 + rand.Int64N(600_000)
	_, err = f.WriteAt([]byte("written"), i*kernel.BlockSize)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		d.t.Fatal(err)
	}
	return i
}

// kill has a child stop or start the tracker and die at a point.
func (d *disk) kill(verb, point string) {
	d.t.Helper()
	task, err := json.Marshal(childTask{verb, d.path, d.state, point})
	if err != nil {
		d.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envChild+"="+string(task))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		d.t.Fatalf("the child was to die at %q: %v: %s", point, err, out)
	}
}

func TestAHistoryGoesOn(t *testing.T) {
	d := newDisk(t)
	s := d.start()
	if s.Resumed || s.Saved || s.Why == nil {
		t.Fatalf("the first start: %+v", s)
	}
	uuid := s.UUID()
	first := d.rotate(s)
	written := d.write()
	s.Close()
	d.save()
	if _, err := trackers.Open(d.path); !errors.Is(err, kernel.ErrNotTracked) {
		t.Fatalf("after the stop: %v", err)
	}
	s = d.start()
	st, err := s.Status(t.Context())
	if err != nil || !s.Resumed || s.Why != nil || s.UUID() != uuid || st.UUID != uuid || !st.Reliable || st.Epoch != 4 {
		t.Fatalf("%+v, %+v, %v", s, st, err)
	}
	if n, err := s.Dirty(t.Context()); n != 0 || err != nil {
		t.Errorf("%d dirty blocks, %v", n, err)
	}
	again := d.write()
	if n, err := s.Dirty(t.Context()); n != 1 || err != nil {
		t.Errorf("%d dirty blocks after one was written, %v", n, err)
	}
	log, err := epochlog.Open(t.Context(), s, d.state)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Unlock()
	if _, err := log.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	dirty, err := log.Since(t.Context(), first.Position)
	if err != nil || !dirty.Get(written) || !dirty.Get(again) || dirty.Count() > 2 {
		t.Fatalf("since the first epoch: %v, %v", dirty, err)
	}
	if err := errors.Join(log.Commit(t.Context()), log.Unlock()); err != nil {
		t.Fatal(err)
	}
	// Used up: the next one begins anew.
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s = d.start(); s.Resumed || s.Saved || s.UUID() == uuid {
		t.Errorf("after a stop without saving: %+v", s)
	}
}

// TestWhateverIsKilledNoWriteIsForgotten kills a stop and a start at every step. If
// a tracker is left, a block is written; whatever history is there two starts later
// knows of it, or is a new one.
func TestWhateverIsKilledNoWriteIsForgotten(t *testing.T) {
	for verb, points := range map[string][]string{
		"stop":  {"claimed", "logged", "witnessed", "stopped", "saved"},
		"start": {"withdrawn", "attached", "claimed", "used", "started"},
	} {
		for _, point := range points {
			t.Run(verb+"/"+point, func(t *testing.T) {
				d := newDisk(t)
				s := d.start()
				uuid := s.UUID()
				d.rotate(s)
				s.Close()
				if verb == "start" {
					d.save()
				}
				d.kill(verb, point)
				tracked := false
				if tr, err := trackers.Open(d.path); err == nil {
					tracked = true
					d.write()
					if err := tr.Stop(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				// Only a stop that came to its end has left something.
				want := verb == "stop" && point == "saved"
				if s = d.start(); s.Resumed != want || (s.UUID() == uuid) != want {
					t.Errorf("tracked meanwhile: %v; resumed: %v (%v)", tracked, s.Resumed, s.Why)
				}
				if left := verb == "start" && point != "withdrawn" || verb == "stop" && point != "stopped" && !want; tracked != left {
					t.Errorf("tracked meanwhile: %v", tracked)
				}
			})
		}
	}
}

func TestADoubtEndsTheHistory(t *testing.T) {
	d := newDisk(t)
	s := d.start()
	uuid := s.UUID()
	if err := s.Invalidate(t.Context(), "it was told so"); err != nil {
		t.Fatal(err)
	}
	why, err := Stop(t.Context(), s, d.state, nodes{})
	if err != nil || why == nil || !strings.Contains(why.Error(), "told so") {
		t.Fatalf("%v, %v", why, err)
	}
	run(t, "mkfs.btrfs", "-q", "-f", d.path)
	s = d.start()
	if s.Resumed || s.UUID() == uuid {
		t.Fatalf("an unreliable history goes on: %+v", s)
	}
	if why, err := Stop(t.Context(), s, d.state, nodes{}); err != nil || !errors.Is(why, fingerprint.ErrNoProof) {
		t.Fatalf("btrfs: %v, %v", why, err)
	}
	if _, err := trackers.Open(d.path); !errors.Is(err, kernel.ErrNotTracked) {
		t.Error(err)
	}
}

func TestADeviceInUseStaysTracked(t *testing.T) {
	d := newDisk(t)
	s := d.start()
	claim, err := nodes{}.Open(d.path, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Stop(t.Context(), d.open(), d.state, nodes{}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("%v", err)
	}
	claim.Close()
	st, err := s.Status(t.Context())
	if err != nil || !st.Reliable {
		t.Fatalf("%+v, %v", st, err)
	}
	s.Close()
	d.save()
	// Nor does a history go on of what somebody uses already, or a start that fails
	// cost the one that was saved.
	if _, err := Start(t.Context(), d.path, Options{Options: trackers.Options{Kind: "none"}, StateDir: d.state}, nodes{}); err == nil {
		t.Fatal("started")
	}
	if claim, err = (nodes{}).Open(d.path, true); err != nil {
		t.Fatal(err)
	}
	if s = d.start(); s.Resumed || !s.Saved || !errors.Is(s.Why, unix.EBUSY) {
		t.Errorf("%+v", s)
	}
	claim.Close()
	s.Close()
	d.save() // so that the fresh one was found above, not an older one
	if s = d.start(); !s.Resumed {
		t.Errorf("%v", s.Why)
	}
}

// TestSomebodyWritesWithoutAClaim: what is written between the fingerprint and the
// end is noticed.
func TestSomebodyWritesWithoutAClaim(t *testing.T) {
	for _, point := range []string{"witnessed", "logged"} {
		d := newDisk(t)
		s := d.start()
		why, err := stop(t.Context(), s, d.state, nodes{}, func(at string) {
			if at == point {
				d.write()
			}
		})
		if err != nil || why == nil || !strings.Contains(why.Error(), "writing") {
			t.Errorf("written when %s: %v, %v", point, why, err)
		}
	}
}

func TestAFreshHistoryIsBegunWhenAsked(t *testing.T) {
	d := newDisk(t)
	s := d.start()
	uuid := s.UUID()
	s.Close()
	d.save()
	s, err := Start(t.Context(), d.path, Options{Options: bpfOnly, StateDir: d.state, Fresh: true}, nodes{})
	if err != nil || s.Resumed || s.UUID() == uuid {
		t.Fatalf("%+v, %v", s, err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s = d.start(); s.Resumed {
		t.Error("the older history goes on after a fresh one")
	}
}

// TestStopsAndStartsAtOnce: of a stop and several starts at the same time, whatever
// comes of them, no saved state lies there while the device has a tracker.
func TestStopsAndStartsAtOnce(t *testing.T) {
	d := newDisk(t)
	d.start().Close()
	for round := range 4 {
		var all sync.WaitGroup
		all.Go(func() {
			if tr, err := trackers.Open(d.path); err == nil {
				_, _ = Stop(t.Context(), tr, d.state, nodes{})
			}
		})
		for range 2 {
			all.Go(func() {
				if s, err := Start(t.Context(), d.path, Options{Options: bpfOnly, StateDir: d.state}, nodes{}); err == nil {
					s.Close()
				}
			})
		}
		all.Wait()
		tracked := trackers.CheckUntracked(d.path) != nil
		saved, _ := filepath.Glob(filepath.Join(d.state, "trackers/*/saved"))
		if tracked == (len(saved) > 0) {
			t.Fatalf("round %d: tracked: %v, saved: %v", round, tracked, saved)
		}
		if !tracked {
			if s := d.start(); !s.Resumed {
				t.Errorf("round %d: %v", round, s.Why)
			} else {
				s.Close()
			}
		}
	}
}

// TestAStoppedTrackerIsNotRenewed: a process that still holds a tracker, and finds it
// stopped, begins no history behind the one that was saved.
func TestAStoppedTrackerIsNotRenewed(t *testing.T) {
	d := newDisk(t)
	held := d.start()
	d.save()
	if tr, err := trackers.Renew(t.Context(), held.Tracker, d.path); err == nil || !strings.Contains(err.Error(), "stopped meanwhile") {
		t.Fatalf("renewed: %v, %v", tr, err)
	}
	if s := d.start(); !s.Resumed {
		t.Error(s.Why)
	}
}
