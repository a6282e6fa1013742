// SPDX-License-Identifier: BSD-2-Clause

package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// Status looks at the tracker, its links and its device; see [kernel.Tracker].
func (t *Tracker) Status(ctx context.Context) (kernel.Status, error) {
	if err := ctx.Err(); err != nil {
		return kernel.Status{}, err
	}
	st := kernel.Status{Device: t.Device(), Tracker: "bpf", UUID: t.uuid, BlockSize: kernel.BlockSize, Reason: t.broken}
	if t.broken != "" {
		return st, nil
	}
	s, err := loadState(t.stateMap())
	if err != nil {
		return kernel.Status{}, err
	}
	if s.UUID != t.uuid {
		st.Reason = "another history has its place"
		return st, nil
	}
	st.Epoch = s.Epoch
	st.Reason, err = t.judge(s)
	st.Reliable = st.Reason == ""
	return st, err
}

// Dirty counts marked blocks; see [kernel.Tracker].
func (t *Tracker) Dirty(ctx context.Context) (int64, error) {
	if err := ctx.Err(); err != nil || t.broken != "" {
		return 0, err
	}
	s, err := loadState(t.stateMap())
	if err != nil || s.UUID != t.uuid {
		return 0, err
	}
	if s.PendingAll != 0 {
		return t.target.blocks(), nil
	}
	return countUnion([2]*ebpf.Map{t.bits(0), t.bits(1)}, t.target.blocks())
}

// judge says why the tracker is not reliable, or nothing. The first reason
// found stays the reason for good.
func (t *Tracker) judge(s state) (string, error) {
	b, err := loadRecord(t.verdictMap())
	if err != nil {
		return "", err
	}
	if reason := cString(b); reason != "" {
		return reason, nil
	}
	reason, err := t.inspect(s)
	if reason == "" || err != nil {
		return reason, err
	}
	return reason, t.setVerdict(reason)
}

// inspect looks for each thing that makes a tracker unreliable.
func (t *Tracker) inspect(s state) (string, error) {
	var raised uint64
	if err := t.raisedMap().Lookup(uint32(0), &raised); err != nil {
		return "", fmt.Errorf("read the kernel side's flags: %w", err)
	}
	if reason := flagReason(raised); reason != "" {
		return reason, nil
	}
	if s.Step == stepStopping {
		return "tracking was stopped", nil
	}
	if reason := t.inspectPins(s); reason != "" {
		return reason + afresh, nil
	}
	now, err := describe(t.target.dev)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Sprintf("the device %s is gone", t.Device()) + afresh, nil
	}
	if err != nil {
		return "", err
	}
	if reason := differReason(t.target, now); reason != "" || !t.target.mapped {
		return reason, nil
	}
	return t.inspectStack()
}

// inspectPins makes sure that what is pinned is what was pinned at the start:
// a raw tracepoint link stays attached for as long as it exists, and a program
// keeps its maps.
func (t *Tracker) inspectPins(s state) string {
	for i, name := range mapNames {
		m, err := ebpf.LoadPinnedMap(filepath.Join(t.dir, name), nil)
		if err != nil {
			return fmt.Sprintf("its pinned map %s is gone", name)
		}
		id, err := mapID(m)
		_ = m.Close()
		if err != nil || uint32(id) != s.Maps[i] {
			return fmt.Sprintf("its pinned map %s was replaced", name)
		}
	}
	for i, name := range programNames {
		if s.Links[i] == 0 {
			continue
		}
		l, err := link.LoadPinnedLink(filepath.Join(t.dir, pinPrefix+name), nil)
		if err != nil {
			return fmt.Sprintf("its tracing link %s is gone", name)
		}
		info, err := l.Info()
		_ = l.Close()
		if err != nil || uint32(info.ID) != s.Links[i] || uint32(info.Program) != s.Progs[i] {
			return fmt.Sprintf("its tracing link %s was replaced", name)
		}
	}
	return t.inspectActive(s)
}

// inspectActive makes sure that the programs mark in a bitmap of ours.
func (t *Tracker) inspectActive(s state) string {
	first, err0 := t.isActive(s.Active)
	if err0 != nil {
		return "its active bitmap is gone"
	}
	if !first && s.Step != stepRotating {
		// Another process may have rotated since the state was read.
		if again, err := loadState(t.stateMap()); err == nil && again.Step == s.Step && again.Epoch == s.Epoch {
			return "its active bitmap was replaced"
		}
	}
	return ""
}

// Invalidate makes the tracker unreliable from now on.
func (t *Tracker) Invalidate(ctx context.Context, reason string) error {
	if _, err := t.usable(ctx); err != nil {
		return err
	}
	if reason == "" {
		return errors.New("invalidate tracker: no reason given")
	}
	b, err := loadRecord(t.verdictMap())
	if err != nil || cString(b) != "" {
		return err
	}
	return t.setVerdict(reason)
}

func (t *Tracker) setVerdict(reason string) error {
	b := []byte(strings.NewReplacer("\n", " ", "\x00", " ").Replace(reason))
	size := int(t.verdictMap().ValueSize()) - 1
	return storeRecord(t.verdictMap(), b[:min(len(b), size)])
}
