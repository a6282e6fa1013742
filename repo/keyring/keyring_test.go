// SPDX-License-Identifier: BSD-2-Clause

package keyring

import (
	"crypto/rand"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// named gives a name that no other test uses, whose key goes with the test.
func named(t *testing.T, k *Keyring) string {
	t.Helper()
	name := "test-" + rand.Text()
	t.Cleanup(func() {
		if err := k.Drop(name); err != nil {
			t.Error(err)
		}
	})
	return name
}

func open(t *testing.T, kept time.Duration) *Keyring {
	t.Helper()
	k, err := New(kept)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func want(t *testing.T, k *Keyring, name, key string) {
	t.Helper()
	if got, err := k.Get(name); err != nil || string(got) != key {
		t.Errorf("got %q, %v, want %q", got, err, key)
	}
}

func TestKeysAreKeptReplacedAndDropped(t *testing.T) {
	k := open(t, time.Minute)
	name := named(t, k)
	want(t, k, name, "")
	for _, key := range []string{"a key", "another one"} {
		if err := k.Put(name, []byte(key)); err != nil {
			t.Fatal(err)
		}
		want(t, k, name, key)
	}
	want(t, k, name+"x", "")
	if err := k.Drop(name); err != nil {
		t.Fatal(err)
	}
	want(t, k, name, "")
}

func TestKeysExpireAlthoughTheyAreUsed(t *testing.T) {
	k := open(t, time.Second)
	name := named(t, k)
	if err := k.Put(name, []byte("key")); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		got, err := k.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		if got == nil {
			break
		}
		if time.Since(start) > time.Minute {
			t.Fatal("it is there after a minute")
		}
	}
}

// Whoever runs as another user finds nothing; a job of the same user in another
// session does.
func TestOnlyTheSameUserReadsAKey(t *testing.T) {
	if name := os.Getenv("KEYRING_TEST"); name != "" {
		// A service has a session of its own.
		if _, err := unix.KeyctlJoinSessionKeyring("dsync-keyring-test"); err != nil {
			t.Fatal(err)
		}
		got, err := open(t, time.Minute).Get(name)
		if err != nil || got == nil {
			os.Exit(7)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Fatal("run it as root: it becomes another user")
	}
	k := open(t, time.Minute)
	name := named(t, k)
	if err := k.Put(name, []byte("key")); err != nil {
		t.Fatal(err)
	}
	self := readable(t)
	for user, ok := range map[string]bool{"root": true, "nobody": false} {
		cmd := exec.Command("setpriv", "--reuid", user, "--clear-groups", self, "-test.run", "^TestOnlyTheSameUserReadsAKey$")
		cmd.Env, cmd.Dir = append(os.Environ(), "KEYRING_TEST="+name), "/"
		out, err := cmd.CombinedOutput()
		if ok != (err == nil) {
			t.Errorf("%s: %v\n%s", user, err, out)
		}
		if !ok && cmd.ProcessState.ExitCode() != 7 {
			t.Errorf("%s: it did not get to look: %v\n%s", user, err, out)
		}
	}
	all, err := os.ReadFile("/proc/keys")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(all)) {
		if strings.Contains(line, name) && !strings.Contains(line, "3f2f0000") {
			t.Errorf("its permissions are others: %s", line)
		}
	}
}

// readable is this program where every user can run it.
func readable(t *testing.T) string {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp("/var/tmp", "keyring-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(f.Name()) })
	if _, err := f.Write(self); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(f.Name(), 0o755); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func TestKeysWithoutAnEndAreRefused(t *testing.T) {
	for _, kept := range []time.Duration{0, -time.Hour, time.Millisecond, 100 * 24 * time.Hour} {
		if _, err := New(kept); err == nil {
			t.Errorf("%s is accepted", kept)
		}
	}
}
