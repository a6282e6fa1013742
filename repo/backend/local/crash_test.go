// SPDX-License-Identifier: BSD-2-Clause

package local_test

import (
	"bufio"
	"encoding/binary"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
)

// saverDir, if set, makes the test program save files there for ever.
const saverDir = "LOCAL_TEST_SAVE_INTO"

func TestMain(m *testing.M) {
	if dir := os.Getenv(saverDir); dir != "" {
		saveForever(dir)
	}
	os.Exit(m.Run())
}

// saveForever saves files of up to 4 MiB and writes the name of each to stdout
// when Save has returned.
func saveForever(dir string) {
	t := new(testing.B)
	be, r := created(t, dir), backendtest.Rand(t)
	buffer := backendtest.Bytes(r, 4<<20)
	for {
		data := buffer[:8+r.IntN(len(buffer)-8)]
		binary.LittleEndian.PutUint64(data, r.Uint64())
		h := backendtest.HandleOf(backend.PackFile, data)
		if err := be.Save(ctx, h, data); err != nil {
			os.Stdout.WriteString("error " + err.Error() + "\n")
			os.Exit(1)
		}
		os.Stdout.WriteString(h.Name + "\n")
	}
}

// TestAKilledSaveLeavesNoPartialFile kills a process that saves at 200 [25]
// random moments. What it said is saved is there; whatever bears a final name
// is whole; nothing else is listed.
func TestAKilledSaveLeavesNoPartialFile(t *testing.T) {
	kills := 25
	if os.Getenv("SOAK") == "1" {
		kills = 200
	}
	r := backendtest.Rand(t)
	leftovers, files := 0, 0
	for n := 0; n < kills || leftovers == 0 && n < 10*kills; n++ {
		dir := filepath.Join(t.TempDir(), "repo")
		saved := runAndKill(t, dir, time.Duration(r.IntN(60_000))*time.Microsecond)
		be := open(t, dir)
		listed, err := backendtest.List(ctx, be, backend.PackFile)
		if err != nil {
			t.Fatal(err)
		}
		for name := range listed {
			h := backend.Handle{Type: backend.PackFile, Name: name}
			data, err := backendtest.Load(ctx, be, h, 0, 0)
			if err != nil || backendtest.HandleOf(backend.PackFile, data) != h {
				t.Errorf("%s holds %d bytes that are not its own, error %v", name, len(data), err)
			}
		}
		for _, name := range saved {
			if _, ok := listed[name]; !ok {
				t.Errorf("%s was saved and is not there", name)
			}
		}
		be.Close()
		leftovers += len(strangers(t, dir))
		files += len(listed)
		if n := countFiles(t, dir); n != len(listed)+len(strangers(t, dir)) {
			t.Errorf("there are %d files, %d of them listed", n, len(listed))
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills, %d files saved, %d temporary files left", kills, files, leftovers)
	if leftovers == 0 || files == 0 {
		t.Errorf("no kill hit a save (%d left over, %d files): the test proves nothing", leftovers, files)
	}
}

// runAndKill starts the saver, kills it some time after its first file, and
// returns the names that it reported.
func runAndKill(t *testing.T, dir string, after time.Duration) (names []string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), saverDir+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if len(names) == 0 {
			time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
		names = append(names, lines.Text())
	}
	_ = cmd.Wait() // it was killed
	if len(names) == 0 || strings.HasPrefix(names[len(names)-1], "error") {
		t.Fatalf("the saving process failed: %v", names)
	}
	if last := names[len(names)-1]; len(last) < 64 {
		names = names[:len(names)-1]
	}
	return names
}

func countFiles(t *testing.T, dir string) (n int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
