// SPDX-License-Identifier: BSD-2-Clause

package lvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// program finds LVM, also where only root looks.
func program() (string, error) {
	for _, name := range []string{"lvm", "/usr/sbin/lvm", "/sbin/lvm"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", ErrMissing
}

// run runs one of LVM's commands and returns its standard output. It is not
// interrupted: LVM suspends devices, and resumes them itself. lock, if not nil,
// stays locked until the command has ended, even if this process dies before.
func run(lock *os.File, args ...string) ([]byte, error) {
	path, err := program()
	if err != nil {
		return nil, err
	}
	// Into memory: a pipe would end with this process, and may be full, while
	// devices are suspended.
	stdout, err := memory()
	if err != nil {
		return nil, err
	}
	defer stdout.Close()
	stderr, err := memory()
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if lock != nil {
		cmd.Stdin = lock // empty; LVM closes all other files
	}
	cmd.Env = append(os.Environ(), "LC_ALL=C", "LVM_SUPPRESS_FD_WARNINGS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // not what ^C ends
	err = cmd.Run()
	said, readErr := written(stderr)
	if err != nil {
		if line := oneLine(said); line != "" {
			err = errors.New(line)
		}
		return nil, fmt.Errorf("%s: %w", args[0], err)
	}
	if readErr != nil {
		return nil, readErr
	}
	return written(stdout)
}

func memory() (*os.File, error) {
	fd, err := unix.MemfdCreate("lvm", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make room for what LVM says: %w", err)
	}
	return os.NewFile(uintptr(fd), "what LVM says"), nil
}

func written(f *os.File) ([]byte, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(f)
}

// oneLine makes one of what LVM said, without its warnings and hints.
func oneLine(said []byte) string {
	var lines []string
	for line := range strings.Lines(string(said)) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "WARNING") && !strings.HasPrefix(line, "Run `") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}

// row is one line of a report, by the fields' names.
type row map[string]string

// report runs lvs for the fields.
func report(ctx context.Context, lock *os.File, fields string, args ...string) ([]row, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	args = append([]string{"lvs", "-a", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields}, args...)
	out, err := run(lock, args...)
	if err != nil {
		return nil, err
	}
	return parseReport(out)
}

func parseReport(out []byte) ([]row, error) {
	var doc struct {
		Report []map[string][]row `json:"report"`
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return nil, fmt.Errorf("read what lvs says: %w", err)
	}
	var rows []row
	for _, r := range doc.Report {
		for _, kind := range r { // "lv", or "seg" if fields of segments are in it
			rows = append(rows, kind...)
		}
	}
	return rows, nil
}
