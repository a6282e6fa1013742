// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os/exec"
	"strings"
)

// remote says how a target on another host is reached.
type remote struct {
	ssh      string // the command, with its options
	program  string
	stateDir string
}

// command is the target's end: this very program for a path, which is then
// returned, or ssh for ssh://[user@]host[:port]/path.
func (r remote) command(ctx context.Context, g *globals, target string, force bool, spool string) (cmd *exec.Cmd, local string, err error) {
	args := []string{"merge", "--serve"}
	if force {
		args = append(args, "--force")
	}
	if spool != "" {
		args = append(args, "--spool="+spool)
	}
	if !strings.Contains(target, "://") {
		args = append(args, "--state-dir="+g.stateDir, "--", target)
		cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
		cmd.Args[0] = "dsync-backup"
		cmd.Cancel = func() error { return nil } // it ends with its input
		return cmd, target, nil
	}
	dest, path, err := parseSSH(target)
	if err != nil {
		return nil, "", err
	}
	if r.stateDir != "" {
		args = append(args, "--state-dir="+r.stateDir)
	}
	args = append(args, "--", path)
	remote := r.program
	for _, a := range args {
		remote += " " + quote(a)
	}
	// The shell splits the command that the user gave.
	cmd = exec.CommandContext(ctx, "sh", append([]string{"-c", r.ssh + ` "$@"`, "sh"}, append(dest, remote)...)...)
	cmd.Cancel = func() error { return nil }
	return cmd, "", nil
}

// parseSSH gives ssh's arguments up to the host, and the path there.
func parseSSH(target string) (dest []string, path string, err error) {
	u, err := url.Parse(target)
	if err != nil || u.Scheme != "ssh" || u.Hostname() == "" || u.Path == "" || u.Path == "/" || u.RawQuery != "" || u.Fragment != "" {
		return nil, "", fmt.Errorf("target %q: want a path, or ssh://[USER@]HOST[:PORT]/PATH", target)
	}
	if _, has := u.User.Password(); has {
		return nil, "", errors.New("target: a password in it would be seen by everybody: use a key")
	}
	if port := u.Port(); port != "" {
		dest = append(dest, "-p", port)
	}
	host := u.Hostname()
	if name := u.User.Username(); name != "" {
		host = name + "@" + host
	}
	if strings.HasPrefix(host, "-") {
		return nil, "", fmt.Errorf("target %q: no host begins with a dash", target)
	}
	return append(dest, "--", host), u.Path, nil
}

// quote makes a word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
