// SPDX-License-Identifier: BSD-2-Clause

// Package host is the machine that the benchmark runs on: what it is, its loop
// devices and mounts, its page cache, and what a process costs it.
package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Describe says what machine this is, one line for each thing.
func Describe() [][2]string {
	d := [][2]string{
		{"CPU", field("/proc/cpuinfo", "model name")},
		{"cores", strconv.Itoa(runtime.NumCPU())},
		{"memory", memory()},
		{"kernel", first("/proc/sys/kernel/osrelease")},
		{"virtualised", virtual()},
		{"Go", runtime.Version()},
	}
	return d
}

// Load is the machine's load, averaged over the last minute, or -1.
func Load() float64 {
	var load float64
	if _, err := fmt.Sscan(first("/proc/loadavg"), &load); err != nil {
		return -1
	}
	return load
}

func first(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}

func field(path, name string) string {
	b, _ := os.ReadFile(path)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

func memory() string {
	kib, err := strconv.ParseInt(strings.TrimSuffix(field("/proc/meminfo", "MemTotal"), " kB"), 10, 64)
	if err != nil {
		return "unknown"
	}
	return fmt.Sprintf("%.1f GiB", float64(kib)/(1<<20))
}

func virtual() string {
	if strings.Contains(field("/proc/cpuinfo", "flags"), "hypervisor") {
		return "yes"
	}
	return "no"
}

// DropCaches writes out what is dirty and empties the page cache.
func DropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// Cost is what a command cost.
type Cost struct {
	Seconds float64
	CPU     float64 // user and system seconds, of its waited-for children too
	Memory  int64   // peak resident bytes of its largest process
	Blocks  int64   // bytes that it had read from block devices
	Stolen  float64 // seconds of all cores together that the hypervisor gave to others meanwhile
	Stdout  []byte
}

// Command is what is run.
type Command struct {
	Args   []string
	Env    []string // added to this process's
	Stdin  io.Reader
	Stdout io.Writer // else it is in Cost
}

// Run runs a command and says what it cost.
func Run(ctx context.Context, c Command) (Cost, error) {
	p, err := Start(ctx, c)
	if err != nil {
		return Cost{}, err
	}
	return p.Wait()
}

// Process is a command that runs.
type Process struct {
	cmd       *exec.Cmd
	out, errs bytes.Buffer
	started   time.Time
	stolen    float64
}

// shrink makes this process's own peak of memory small: the kernel counts as a
// process's peak also what it had before it became the command.
func shrink() {
	debug.FreeOSMemory()
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) // else figures are too high, as the report's floor shows
}

// Floor is below what no command's Memory is told, in bytes: what this process
// has itself when it starts one.
func Floor() int64 {
	shrink()
	c, err := Run(context.Background(), Command{Args: []string{"true"}})
	if err != nil {
		return -1
	}
	return c.Memory
}

// Start starts a command.
func Start(ctx context.Context, c Command) (*Process, error) {
	shrink()
	p := &Process{cmd: exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)}
	p.cmd.Env = append(os.Environ(), c.Env...)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = c.Stdin, c.Stdout, &p.errs
	if c.Stdout == nil {
		p.cmd.Stdout = &p.out
	}
	p.started, p.stolen = time.Now(), stolen()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	return p, nil
}

// Wait waits for its end.
func (p *Process) Wait() (Cost, error) {
	err := p.cmd.Wait()
	c := Cost{Seconds: time.Since(p.started).Seconds(), Stdout: p.out.Bytes(), Stolen: stolen() - p.stolen}
	if p.cmd.ProcessState != nil {
		c.CPU = (p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()).Seconds()
		if u, ok := p.cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
			c.Memory, c.Blocks = u.Maxrss<<10, u.Inblock*512
		}
	}
	if err != nil {
		return c, fmt.Errorf("%s: %w: %s%s", strings.Join(p.cmd.Args, " "), err, tail(p.out.String()), tail(p.errs.String()))
	}
	return c, nil
}

// stolen is how many seconds of all cores together the hypervisor has given to others.
func stolen() float64 {
	f := strings.Fields(first("/proc/stat")) // cpu user nice system idle iowait irq softirq steal
	if len(f) < 9 {
		return 0
	}
	ticks, _ := strconv.ParseFloat(f[8], 64)
	return ticks / 100 // USER_HZ
}

// Pipe runs two commands, the output of the first being the input of the
// second.
func Pipe(ctx context.Context, from, to Command) (a, b Cost, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return a, b, err
	}
	from.Stdout, to.Stdin = w, r
	second, err := Start(ctx, to)
	r.Close()
	if err != nil {
		w.Close()
		return a, b, err
	}
	first, err := Start(ctx, from)
	w.Close()
	if err == nil {
		a, err = first.Wait()
	}
	b, err2 := second.Wait()
	return a, b, errors.Join(err, err2)
}

func tail(s string) string { return s[max(0, len(s)-2000):] }

// Output runs a command that is not measured, and gives what it prints.
func Output(ctx context.Context, args ...string) (string, error) {
	c, err := Run(ctx, Command{Args: args})
	return strings.TrimSpace(string(c.Stdout)), err
}

// Disk is a loop device on a sparse file, which reads and writes the file past
// the page cache as a disk would.
type Disk struct {
	Path string // of the device
	File string
}

// NewDisk makes a file of size bytes and a device on it.
func NewDisk(ctx context.Context, file string, size int64) (*Disk, error) {
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	err = f.Truncate(size)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, err
	}
	path, err := Output(ctx, "losetup", "--find", "--show", "--direct-io=on", file)
	if err != nil {
		return nil, err
	}
	return &Disk{path, file}, nil
}

// Close detaches the device and removes the file.
func (d *Disk) Close() error {
	_, err := Output(context.Background(), "losetup", "--detach", d.Path)
	return errors.Join(err, os.Remove(d.File))
}

// BytesRead is how many bytes the device has read since it was made.
func (d *Disk) BytesRead() (int64, error) {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path), "stat"))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) < 3 {
		return 0, fmt.Errorf("statistics of %s: %q", d.Path, b)
	}
	n, err := strconv.ParseInt(f[2], 10, 64)
	return n * 512, err
}

// Size is the bytes of all files below a folder, or of a file.
func Size(path string) (total int64, err error) {
	err = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it went meanwhile
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			total += fi.Size()
		}
		return err
	})
	return total, err
}
