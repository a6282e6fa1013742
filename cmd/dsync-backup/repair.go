// SPDX-License-Identifier: BSD-2-Clause

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dsync-backup/dsync-backup/repo/reindex"
)

func newRepair(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "repair", Short: "Mend a repository"}
	cmd.AddCommand(newRepairIndex(g))
	return cmd
}

func newRepairIndex(g *globals) *cobra.Command {
	var o reindex.Options
	cmd := &cobra.Command{
		Use:   "index",
		Short: "Make the index anew from the packs",
		Long: `repair index writes an index of the packs that are in the store, as their headers
list them. Index files that cannot be read are removed; packs that are missing
are not listed any more. By default only packs that the index does not know, or
knows with another size, are read. Of a pack whose header cannot be read, what an
index file lists and what is intact is stored anew, in another pack.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, ctx, err := g.openExclusive(cmd.Context(), false)
			if err != nil {
				return err
			}
			p := g.progress("repair index")
			defer p.end()
			o.Progress = p.count
			o.Say = func(line string) {
				if !g.json && !g.quiet {
					fmt.Fprintln(g.stdout, line)
				}
			}
			s, err := reindex.Reindex(ctx, r, o)
			if err != nil {
				return causeOf(ctx, err)
			}
			p.end()
			if g.json {
				g.printJSON(g.stdout, s)
				return nil
			}
			if g.quiet {
				return nil
			}
			fmt.Fprintf(g.stdout, "read %d packs: %d were not listed, %d were listed otherwise, %d cannot be read; %d were missing; wrote %d index files, removed %d\n",
				s.PacksRead, s.PacksAdded, s.PacksChanged, len(s.PacksBad), s.PacksMissing, s.IndexesWritten, s.IndexesRemoved)
			if s.BlobsKept+s.BlobsLost > 0 {
				fmt.Fprintf(g.stdout, "%d blobs of packs that cannot be read were stored anew, %d are lost there\n", s.BlobsKept, s.BlobsLost)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&o.ReadAllPacks, "read-all-packs", false, "believe no index file, read the headers of all packs")
	return cmd
}
