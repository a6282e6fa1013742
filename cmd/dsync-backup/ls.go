// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/repo"
	"github.com/dsync-backup/dsync-backup/snapshot"
	"github.com/dsync-backup/dsync-backup/snapshot/layer"
)

// selectFlags picks one device of one snapshot.
type selectFlags struct {
	filter func() repo.SnapshotFilter
	device string
	// salvage makes do with what there is of a damaged repository.
	salvage bool
	// canSalvage: the command has a flag for that.
	canSalvage bool
}

func (s *selectFlags) register(cmd *cobra.Command) {
	s.filter = filterFlags(cmd)
	cmd.Flags().StringVar(&s.device, "device", "", "`name` of the device, if the snapshot holds several")
}

// find finds the device that the user means.
func (s *selectFlags) find(ctx context.Context, r *repo.Repository, name string) (snapshot.Device, error) {
	id, sn, err := r.FindSnapshot(ctx, name, s.filter())
	if err != nil {
		return snapshot.Device{}, err
	}
	devices, err := snapshot.Devices(ctx, snapshot.Store{Repository: r}, id, sn)
	if err != nil {
		return snapshot.Device{}, err
	}
	for _, d := range devices {
		if d.Name == s.device || s.device == "" && len(devices) == 1 {
			return d, nil
		}
	}
	return snapshot.Device{}, fmt.Errorf("snapshot %s holds %d devices, and none is named %q: say which one with --device", id.Str(), len(devices), s.device)
}

// orSalvage says of what is refused for damage how to have what there is.
func (s *selectFlags) orSalvage(err error) error {
	if !s.canSalvage || s.salvage {
		return err
	}
	return fmt.Errorf("%w; with --salvage you get what there is", err)
}

// open opens the repository to read it, and finds the device that the user means.
func (s *selectFlags) open(ctx context.Context, g *globals, name string) (context.Context, snapshot.Store, snapshot.Device, error) {
	how := g.openReading
	if s.salvage {
		how = g.openSalvaging
	}
	r, ctx, err := how(ctx)
	if err != nil {
		if r != nil && errors.Is(err, repo.ErrDamaged) { // an index file
			err = s.orSalvage(err)
		}
		return ctx, snapshot.Store{}, snapshot.Device{}, err
	}
	d, err := s.find(ctx, r, name)
	return ctx, snapshot.Store{Repository: r}, d, err
}

func newLs(g *globals) *cobra.Command {
	sel := selectFlags{salvage: true}
	cmd := &cobra.Command{
		Use:   "ls SNAPSHOT",
		Short: "Show what a snapshot of a device consists of",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, from, d, err := sel.open(cmd.Context(), g, args[0])
			if err != nil {
				return err
			}
			return ls(ctx, g, from, d)
		},
	}
	sel.register(cmd)
	return cmd
}

// listedLayer is a layer as ls shows it.
type listedLayer struct {
	MessageType string `json:"message_type"` // "layer"
	Layer       uint64 `json:"layer"`
	layer.Stats
}

func ls(ctx context.Context, g *globals, from snapshot.Store, d snapshot.Device) error {
	layers, err := layer.Open(ctx, from, d.Manifest.Layers)
	if err != nil {
		return err
	}
	if g.json {
		g.printJSON(g.stdout, struct {
			MessageType string             `json:"message_type"`
			Snapshot    repo.ID            `json:"snapshot_id"`
			Name        string             `json:"name"`
			Manifest    *snapshot.Manifest `json:"device"`
		}{"device", d.Snapshot, d.Name, d.Manifest})
	} else {
		m := d.Manifest
		fmt.Fprintf(g.stdout, "snapshot %s of %s: %s, changes: %s, point in time: %s\n", d.Snapshot.Str(), d.Name, size(m.Size), m.Changes, m.PointInTime)
		if m.Position != nil {
			fmt.Fprintf(g.stdout, "complete up to epoch %d of tracker %s\n", m.Position.Epoch, m.Position.Tracker)
		}
		fmt.Fprintf(g.stdout, "%-18s%8s%10s%12s%12s\n", "Layer", "Parts", "Extents", "Data", "Zeros")
	}
	for _, l := range layers {
		st, err := l.Stats(ctx, from)
		if err != nil {
			return err
		}
		if g.json {
			g.printJSON(g.stdout, listedLayer{"layer", l.Number, st})
			continue
		}
		fmt.Fprintf(g.stdout, "%016x  %8d%10d%12s%12s\n", l.Number, st.Parts, st.Extents, size(st.DataBytes), size(st.ZeroBytes))
	}
	return nil
}
