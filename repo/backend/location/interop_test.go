// SPDX-License-Identifier: BSD-2-Clause

package location_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/backend/backendtest"
	"github.com/dsync-backup/dsync-backup/repo/backend/location"
	"github.com/dsync-backup/dsync-backup/repo/backend/miniotest"
)

// resticVersions are the programs to agree with.
func resticVersions() map[string]string {
	return map[string]string{
		"0.14": "/usr/bin/restic",
		"0.18": filepath.Join("..", "..", "..", ".build", "restic-0.18"),
	}
}

// restic runs one of them on a repository.
type restic struct {
	t    *testing.T
	bin  string
	env  []string
	repo string
}

func (r restic) run(args ...string) string {
	r.t.Helper()
	cmd := exec.Command(r.bin, append([]string{"--no-cache", "-r", r.repo}, args...)...)
	cmd.Env = append(append(os.Environ(), "RESTIC_PASSWORD=password"), r.env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("restic %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestResticAndWeReadEachOthersStores lets restic make a repository in each
// kind of store, copies it file by file through our backends into each kind,
// and lets restic check and restore the copy. With SOAK=1 each version makes
// both kinds, else one.
func TestResticAndWeReadEachOthersStores(t *testing.T) {
	server := miniotest.Start(t)
	server.Setenv(t)
	for version, bin := range resticVersions() {
		for _, from := range []string{"directory", "bucket"} {
			if soak := os.Getenv("SOAK") == "1"; !soak && (version == "0.14") != (from == "directory") {
				continue
			}
			t.Run(version+" from "+from, func(t *testing.T) {
				bucket := strings.ReplaceAll(version, ".", "-") + "-" + from
				at := map[string]string{
					"directory": filepath.Join(t.TempDir(), "repo"),
					"bucket":    server.Location(bucket, "made/by/restic"),
				}
				source := t.TempDir()
				data := writeFiles(t, source)
				r := restic{t, bin, server.Environ(), at[from]}
				r.run("init")
				r.run("backup", source)
				r.run("backup", source, "--tag", "second")
				copies := map[string]string{
					"directory": filepath.Join(t.TempDir(), "deep", "copy"),
					"bucket":    server.Location(bucket+"-copy", ""),
				}
				for to, dst := range copies {
					t.Run("to "+to, func(t *testing.T) {
						copyStore(t, at[from], dst)
						r := restic{t, bin, server.Environ(), dst}
						r.run("check", "--read-data")
						target := t.TempDir()
						r.run("restore", "latest", "--target", target)
						got, err := os.ReadFile(filepath.Join(target, source, "file"))
						if err != nil || !bytes.Equal(got, data) {
							t.Errorf("restored file: %d bytes, error %v", len(got), err)
						}
					})
				}
			})
		}
	}
}

// writeFiles makes something to back up and returns the contents of "file".
func writeFiles(t *testing.T, dir string) []byte {
	t.Helper()
	data := backendtest.Bytes(backendtest.Rand(t), 20<<20)
	for name, content := range map[string][]byte{"file": data, "small": []byte("small"), "empty": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return data
}

// copyStore copies all files of a repository, each checked against its name.
func copyStore(t *testing.T, from, to string) {
	t.Helper()
	ctx := context.Background()
	src, dst := opener(from, location.Options{})(t), opener(to, location.Options{})(t)
	defer src.Close()
	defer dst.Close()
	if err := dst.Create(ctx); err != nil {
		t.Fatal(err)
	}
	counts := map[backend.FileType]int{}
	for _, ft := range append([]backend.FileType{backend.ConfigFile}, backendtest.Types...) {
		err := src.List(ctx, ft, func(fi backend.FileInfo) error {
			h := backend.Handle{Type: ft, Name: fi.Name}
			data, err := backendtest.Load(ctx, src, h, 0, 0)
			if err != nil {
				return err
			}
			if want := backendtest.HandleOf(ft, data); h != want || int64(len(data)) != fi.Size {
				t.Errorf("%v of %d bytes was loaded as %d bytes with the hash of %v", h, fi.Size, len(data), want)
			}
			counts[ft]++
			return dst.Save(ctx, h, data)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if counts[backend.ConfigFile] != 1 || counts[backend.KeyFile] != 1 || counts[backend.SnapshotFile] != 2 ||
		counts[backend.IndexFile] == 0 || counts[backend.PackFile] < 2 {
		t.Errorf("restic's repository has these numbers of files: %v", counts)
	}
}
