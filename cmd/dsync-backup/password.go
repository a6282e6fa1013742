// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/term"

	"github.com/dsync-backup/dsync-backup/repo"
)

// noPassword is the [repo.ErrWrongPassword] of one that was not tried.
type noPassword string

func (e noPassword) Error() string { return string(e) }

// Is is for errors.Is.
func (noPassword) Is(target error) bool { return target == repo.ErrWrongPassword }

// password finds the repository's password where restic would look for it. A
// new one, typed at a terminal, is asked for twice.
func (g *globals) password(ctx context.Context, isNew bool) (string, error) {
	switch {
	case g.passwordFile != "" && g.passwordCommand != "":
		return "", errors.New("password: give a file or a command, not both")
	case g.passwordFile != "":
		b, err := os.ReadFile(g.passwordFile)
		if err != nil {
			return "", fmt.Errorf("read the password: %w", err)
		}
		return firstLine(b)
	case g.passwordCommand != "":
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", g.passwordCommand)
		cmd.Stderr = g.stderr
		b, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("run the password command: %w", err)
		}
		return firstLine(b)
	}
	if p := os.Getenv("RESTIC_PASSWORD"); p != "" {
		return p, nil
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return "", noPassword("no password is given: use $RESTIC_PASSWORD, --password-file or --password-command")
	}
	p, err := g.ask("password of the repository: ")
	if err != nil || !isNew {
		return p, err
	}
	again, err := g.ask("the same again: ")
	if err == nil && again != p {
		err = errors.New("the two passwords are not the same")
	}
	return p, err
}

func (g *globals) ask(prompt string) (string, error) {
	fmt.Fprint(g.stderr, prompt)
	b, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(g.stderr)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	return firstLine(b)
}

func firstLine(b []byte) (string, error) {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	p := strings.TrimRight(string(line), "\r")
	if p == "" {
		return "", noPassword("the password that is given is empty")
	}
	return p, nil
}
