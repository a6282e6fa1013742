// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dsync-backup/dsync-backup/systemtest/vm/wire"
)

// bootTime is how long a guest may take until its agent answers. It takes about
// three seconds; a busy host takes longer.
var bootTime = 2 * time.Minute // changed by a test only

// Machine is a guest. Its methods fail the test that it belongs to. They may be called
// from several goroutines, but for those that start or stop it; what may fail a
// test belongs on the goroutine of that test.
type Machine struct {
	t testing.TB
	*state
}

// state is what the views of one machine share (see Machine.In).
type state struct {
	kernel  Kernel
	config  Config
	dir     string // initramfs, disks, logs
	boots   int
	crashed bool // QEMU did, in the newest boot
	*guest       // the running one, nil if it is off
}

// guest is one life of a machine, from boot to end.
type guest struct {
	qemu    *exec.Cmd
	conn    *wire.Conn
	stream  *stream // beneath conn
	monitor *monitor
	log     string        // path of the kernel's log
	dead    chan struct{} // closed when QEMU is gone
	said    *strings.Builder

	mu        sync.Mutex
	last      uint32
	processes map[uint32]*Process
	ended     error           // set once the agent cannot be heard any more
	tests     map[string]bool // packages whose tests are in the guest
}

// Start makes a guest of kernel k and boots it. At the end of the test it is stopped
// and its disks are removed; faults in the kernel's log fail the test; and if the
// test has failed, the end of the log is shown.
func Start(t testing.TB, k Kernel, c Config) *Machine {
	t.Helper()
	if err := Check(); err != nil {
		t.Fatal(err)
	}
	c.defaults()
	m := &Machine{t: t, state: &state{kernel: k, config: c, dir: t.TempDir()}}
	if err := writeInitramfs(m.file("initramfs"), m.dir, k, c); err != nil {
		t.Fatalf("make the guest's initramfs: %v", err)
	}
	for _, d := range c.Disks {
		if err := makeDisk(m.DiskFile(d.Name), d); err != nil {
			t.Fatalf("make disk %s: %v", d.Name, err)
		}
	}
	t.Cleanup(func() {
		if m.guest != nil {
			m.stop()
		}
	})
	m.Boot()
	return m
}

// In returns the same machine for a subtest t: what goes wrong fails t.
func (m *Machine) In(t testing.TB) *Machine { return &Machine{t: t, state: m.state} }

func makeDisk(file string, d Disk) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if d.From != "" {
		from, err := os.Open(d.From)
		if err != nil {
			return errors.Join(err, f.Close())
		}
		defer from.Close()
		if _, err := io.Copy(f, from); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Truncate(d.Size), f.Close())
}

func (m *Machine) file(name string) string { return filepath.Join(m.dir, name) }

// Kernel returns the kernel that the machine runs.
func (m *Machine) Kernel() Kernel { return m.kernel }

// DiskFile returns the file of the host that holds a disk. Look at it only while
// the machine is off.
func (m *Machine) DiskFile(name string) string { return m.file("disk-" + name) }

// Device returns the device of a disk in the guest, such as /dev/vda.
func (m *Machine) Device(name string) string {
	for i, d := range m.config.Disks {
		if d.Name == name {
			return "/dev/vd" + string(rune('a'+i))
		}
	}
	m.t.Helper()
	m.t.Fatalf("the machine has no disk %s", name)
	return ""
}

// Boot starts the machine, which must be off, and waits until it can be used.
func (m *Machine) Boot() {
	m.t.Helper()
	if m.guest != nil {
		m.t.Fatal("boot: the machine is on")
	}
	m.boots++
	g, err := m.boot(nil)
	for tries := 1; err != nil && tries < 3 && m.brokenEmulation(); tries++ {
		m.t.Logf("boot kernel %s once more: the emulation broke: %v", m.kernel.Name, err)
		g, err = m.boot(nil)
	}
	if err != nil {
		m.t.Fatalf("boot kernel %s: %v", m.kernel.Name, err)
	}
	m.guest = g
	for i, d := range m.config.Disks {
		// The order of the disks is a promise of Device.
		if got := m.Run("cat", fmt.Sprintf("/sys/block/vd%c/serial", 'a'+i)); got != d.Name {
			m.t.Fatalf("disk %d of the guest is %q, not %q", i, got, d.Name)
		}
		if d.Name == scratch {
			m.Run("mkfs.ext4", "-q", "-F", m.Device(d.Name))
			m.Run("mount", m.Device(d.Name), "/tmp")
		}
	}
}

// boot starts QEMU, with the memory that was saved if there is any.
func (m *Machine) boot(saved *Memory) (*guest, error) {
	log := m.file(fmt.Sprintf("kernel-%d.log", m.boots))
	// A socket's path may have 107 bytes, and a test's folder has more.
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	listener, err := net.Listen("unix", filepath.Join(dir, "agent"))
	if err != nil {
		return nil, err
	}
	defer listener.Close()

	qemu, err := lookTool("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	arguments := m.arguments(log, listener.Addr().String())
	var listening *net.UnixListener
	if m.config.Monitor {
		socket := filepath.Join(dir, "monitor")
		l, err := net.Listen("unix", socket)
		if err != nil {
			return nil, err
		}
		defer l.Close()
		listening = l.(*net.UnixListener)
		arguments = append(arguments, "-chardev", "socket,id=monitor,path="+socket, "-mon", "chardev=monitor,mode=control")
	}
	if saved != nil {
		arguments = append(arguments, "-incoming", "exec:cat "+saved.file)
	}
	g := &guest{
		qemu: exec.Command(qemu, arguments...),
		log:  log, dead: make(chan struct{}), said: &strings.Builder{},
		processes: map[uint32]*Process{}, tests: map[string]bool{},
	}
	g.qemu.Stderr = g.said
	// No guest outlives its test, however the test ends.
	g.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := g.qemu.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = g.qemu.Wait()
		close(g.dead)
		_ = listener.Close()
	}()
	fail := func(err error) (*guest, error) {
		_ = g.qemu.Process.Kill() // too late for one that crashed
		<-g.dead
		status, _ := g.qemu.ProcessState.Sys().(syscall.WaitStatus)
		m.crashed = status.Signaled() && status.Signal() != syscall.SIGKILL
		faults, _ := m.faults(log)
		return nil, fmt.Errorf("%w\n%s%s%s", err, g.said, faults, m.tail(log))
	}
	if err := listener.(*net.UnixListener).SetDeadline(time.Now().Add(bootTime)); err != nil {
		return fail(err)
	}
	port, err := listener.Accept()
	if err != nil {
		return fail(fmt.Errorf("QEMU did not start: %w", err))
	}
	if listening != nil {
		if g.monitor, err = openMonitor(listening); err != nil {
			return fail(err)
		}
	}
	if saved != nil {
		if err := g.goOn(saved, port); err != nil {
			return fail(err)
		}
		return g, nil
	}
	if err := port.SetReadDeadline(time.Now().Add(bootTime)); err != nil {
		return fail(err)
	}
	g.stream = &stream{conn: port}
	g.conn = wire.New(g.stream)
	ready, err := g.conn.Receive()
	if err != nil {
		return fail(fmt.Errorf("the agent does not answer: %w", err))
	}
	if got := string(ready.Data); ready.Kind != wire.Ready || got != m.kernel.Release {
		return fail(fmt.Errorf("the guest runs %q", got))
	}
	if err := port.SetReadDeadline(time.Time{}); err != nil {
		return fail(err)
	}
	go g.listen(port)
	return g, nil
}

// processor is what QEMU emulates: a guest on this one is about a sixth faster than on one with
// all that QEMU knows, whose wider registers it has to save and to emulate. QEMU 7.2, Debian 12's,
// now and then leaves garbage in the flags after cmpxchg16b, and with it an interrupt or a
// memory allocation of the kernel ends in a double fault: it must not be used.
const processor = "Nehalem,cx16=off,+rdrand"

// arguments returns QEMU's command line.
func (m *Machine) arguments(log, socket string) []string {
	c := m.config
	accel := "tcg,thread=multi"
	if c.Counted {
		accel = "tcg,thread=single"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "pc", "-accel", accel, "-cpu", processor,
		"-smp", fmt.Sprint(c.CPUs), "-m", fmt.Sprint(c.Memory),
		"-kernel", m.kernel.Image(), "-initrd", m.file("initramfs"),
		"-append", strings.TrimSpace("console=ttyS0 ignore_loglevel panic=-1 oops=panic mitigations=off random.trust_cpu=on" +
			// A busy host makes a guest wait, which is no fault of its kernel or of its timer.
			" no_timer_check watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120 sysctl.kernel.hung_task_timeout_secs=240 " + c.Cmdline),
		"-chardev", "file,id=log,path=" + log, "-serial", "chardev:log",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,path=" + socket,
		"-device", "virtserialport,chardev=agent,name=" + wire.Port,
	}
	if c.Counted {
		args = append(args, "-icount", "shift=0,sleep=off")
	}
	for i, d := range c.Disks {
		drive := fmt.Sprintf("if=none,id=d%d,format=raw,file=%s,cache=%s", i, m.DiskFile(d.Name), either(d.Cache, "writeback"))
		if !d.NoDiscard {
			drive += ",discard=unmap"
		}
		if d.ReadOnly {
			drive += ",readonly=on"
		}
		device := fmt.Sprintf("virtio-blk-pci,drive=d%d,serial=%s", i, d.Name)
		if d.BlockSize != 0 {
			device += fmt.Sprintf(",logical_block_size=%d,physical_block_size=%d", d.BlockSize, d.BlockSize)
		}
		if d.NoDiscard {
			device += ",discard=off,write-zeroes=off"
		}
		args = append(args, "-drive", drive, "-device", device)
	}
	return args
}

func either(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// Kill cuts the machine's power. What a disk has taken stays on it, as with a disk
// whose cache survives; what the guest had in memory only is gone.
func (m *Machine) Kill() {
	m.t.Helper()
	if m.guest == nil {
		m.t.Fatal("kill: the machine is off")
	}
	_ = m.qemu.Process.Kill()
	<-m.dead
	m.off()
}

// PowerOff syncs the guest's disks and switches it off.
func (m *Machine) PowerOff() {
	m.t.Helper()
	m.Run("sync")
	m.Kill()
}

// AwaitDeath waits for a guest that panics or switches itself off.
func (m *Machine) AwaitDeath() {
	m.t.Helper()
	if m.guest == nil {
		m.t.Fatal("the machine is off")
	}
	select {
	case <-m.dead:
		m.off()
	case <-time.After(m.config.Timeout):
		m.t.Fatal("the machine does not end")
	}
}

// stop ends what still runs at the end of a test.
func (m *Machine) stop() {
	select {
	case <-m.dead:
		m.t.Errorf("kernel %s: the guest ended before the test did", m.kernel.Name)
	default:
	}
	_ = m.qemu.Process.Kill()
	<-m.dead
	m.off()
}

// off judges the log of a guest that is gone.
func (m *Machine) off() {
	log := m.log
	m.guest = nil
	faults, err := m.faults(log)
	if err != nil {
		m.t.Error(err)
	}
	if faults != "" {
		m.t.Errorf("kernel %s logged a fault:\n%s", m.kernel.Name, faults)
	}
	if m.t.Failed() {
		m.t.Log(m.tail(log))
	}
}
