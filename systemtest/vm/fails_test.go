// SPDX-License-Identifier: BSD-2-Clause

package vm

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

const (
	envMeantToFail = "DSYNC_TEST_MEANT_TO_FAIL"
	samplePackage  = "./systemtest/vm/testdata/sample"
)

// meantToFail are scenarios that must fail, and what they must say. Those with
// parts have them in one guest.
var meantToFail = map[string]struct {
	says     string
	scenario func(t *testing.T, m *Machine)
}{
	"Warnings": {`logged a fault:.*WARNING: CPU: 0 PID: 1 at first.*logged a fault:.*WARNING: CPU: 0 PID: 2 at second`, func(_ *testing.T, m *Machine) {
		m.Shell(`echo "<4>WARNING: CPU: 0 PID: 1 at first" >/dev/kmsg`)
		m.Kill() // a power cut hides nothing
		m.Boot()
		m.Shell(`echo "<4>WARNING: CPU: 0 PID: 2 at second" >/dev/kmsg`)
	}},
	"Panic": {`Kernel panic - not syncing: sysrq triggered crash`, func(_ *testing.T, m *Machine) {
		m.Try("sh", "-c", "echo c >/proc/sysrq-trigger")
	}},
	"Ended": {`the guest ended before the test did`, func(_ *testing.T, m *Machine) { m.Try("poweroff", "-f"); <-m.dead }},
	"Hangs": {`no end after 2s; the kernel's log shows what is blocked.*sysrq: Show Blocked State`, hang},
	"Trapped": {`did not end.*Oops: int3: 0000`, func(_ *testing.T, m *Machine) {
		m.GoTest(samplePackage, Tests{Run: "TestDiesOnce", Env: []string{
			"SAMPLE_DISK=" + m.Device("mark"), "SAMPLE_LOG=" + strings.Replace(lost, "2f 0f <1f>", "2f cc <1f>", 1),
		}})
	}},
	"Parts": {``, func(t *testing.T, m *Machine) {
		for name, part := range partsMeantToFail {
			t.Run(name, func(t *testing.T) { part.scenario(t, m.In(t)) })
		}
	}},
}

var partsMeantToFail = map[string]struct {
	says     string
	scenario func(t *testing.T, m *Machine)
}{
	"Status":  {`in the guest: false: exit status 1`, func(_ *testing.T, m *Machine) { m.Run("false") }},
	"Skipped": {`skipped in the guest, where it must run`, sample("TestSkips")},
	"Failed":  {`sample_test.go:\d+: as it should`, sample("TestFails")},
	"Panics":  {`panic: as it should`, sample("TestPanics")},
	"Exits":   {`began in the guest, and did not end`, sample("TestExits")},
	"NoTest":  {`ran no test in the guest`, sample("TestThatIsNotThere")},
}

func hang(_ *testing.T, m *Machine) {
	m.config.Timeout = 2 * time.Second
	m.Run("sleep", "1000")
}

func sample(name string) func(*testing.T, *Machine) {
	return func(_ *testing.T, m *Machine) { m.GoTest(samplePackage, Tests{Run: "^" + name + "$"}) }
}

// TestMeantToFail is what TestFailuresAreFailures runs in a process of its own.
func TestMeantToFail(t *testing.T) {
	if os.Getenv(envMeantToFail) == "" {
		t.SkipNow()
	}
	k, err := Get(table[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range meantToFail {
		t.Run(name, func(t *testing.T) { c.scenario(t, Start(t, k, Config{Disks: []Disk{{Name: "mark", Size: 1 << 20}}})) })
	}
}

// What goes wrong in a guest fails the test on the host, and is said.
func TestFailuresAreFailures(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestMeantToFail$", "-test.v")
	cmd.Env = append(os.Environ(), envMeantToFail+"=1")
	b, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("all is well in the process that is meant to fail:\n%s", b)
	}
	// What a scenario says is from its beginning to that of the next.
	said := map[string]string{}
	for _, part := range strings.Split(string(b), "=== RUN   TestMeantToFail/") {
		name, rest, _ := strings.Cut(part, "\n")
		path := strings.Split(name, "/")
		if path[0] == "Parts" && len(path) > 1 {
			said["Parts/"+path[1]] += rest
		} else {
			said[path[0]] += rest
		}
	}
	failed := func(name, says string) {
		if !strings.Contains(string(b), "--- FAIL: TestMeantToFail/"+name+" (") {
			t.Errorf("%s did not fail", name)
		}
		if !regexp.MustCompile("(?s)" + says).MatchString(said[name]) {
			t.Errorf("%s does not say %s, but:\n%s", name, says, said[name])
		}
	}
	for name, c := range meantToFail {
		failed(name, c.says)
	}
	for name, c := range partsMeantToFail {
		failed("Parts/"+name, c.says)
	}
}

// What goes well in a guest passes, with the package's files, and a skip that is known.
func TestGuestTestsPass(t *testing.T) {
	Turn(t, 1, func(t *testing.T, k Kernel) {
		m := Start(t, k, Config{})
		m.GoTest(samplePackage, Tests{Run: "TestPasses|TestSkips", Skips: map[string]string{"TestSkips/Within": "the test wants it"}})
	})
}
