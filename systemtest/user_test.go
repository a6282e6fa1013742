// SPDX-License-Identifier: BSD-2-Clause

package systemtest

import (
	"bufio"
	"database/sql"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the database
)

// userArg makes the test's own program a user of a file system.
const userArg = "file-system-user"

// user is a process that works in a mounted file system. It is one of its own
// since a thread that writes to a mapped file while the file system is frozen
// stops outside of any system call, where Go's collector would wait for it.
type user struct {
	t         testing.TB
	cmd       *exec.Cmd
	stdin     io.WriteCloser
	settled   chan struct{} // closed when the asked for changes are made
	ended     chan struct{}
	committed atomic.Int64 // the last transaction that it said is durable
}

// startUser has changes made in dir and returns when so many are made. The
// user then goes on, slowly, until it is stopped.
func startUser(t testing.TB, dir string, seed uint64, changes int) *user {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	u := &user{t: t, settled: make(chan struct{}), ended: make(chan struct{})}
	u.cmd = exec.Command(self, userArg, dir, strconv.FormatUint(seed, 10), strconv.Itoa(changes))
	u.cmd.Stderr = os.Stderr
	if u.stdin, err = u.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := u.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := u.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = u.cmd.Process.Kill()
		select {
		case <-u.ended:
		case <-time.After(5 * time.Second): // it waits for a frozen file system
		}
	})
	go u.listen(out)
	select {
	case <-u.settled:
	case <-u.ended:
		t.Fatalf("the user of %s ended early", dir)
	}
	return u
}

func (u *user) listen(out io.Reader) {
	defer close(u.ended)
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if lines.Text() == "settled" {
			close(u.settled)
			continue
		}
		n, _ := strconv.ParseInt(lines.Text(), 10, 64)
		u.committed.Store(n)
	}
}

// stop lets the user finish what it is doing and leave.
func (u *user) stop() {
	u.t.Helper()
	u.stdin.Close()
	<-u.ended
	if err := u.cmd.Wait(); err != nil {
		u.t.Fatalf("the user of the file system: %v", err)
	}
}

// userMain is the process: folder, seed, number of changes.
func userMain(args []string) int {
	seed, _ := strconv.ParseUint(args[1], 10, 64)
	n, _ := strconv.Atoi(args[2])
	db, err := openDatabase(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	w := &work{dir: args[0], r: rand.New(rand.NewPCG(seed, 1)), db: db}
	if err := w.run(n, stop); err != nil {
		fmt.Fprintf(os.Stderr, "user of %s, seed %d: %v\n", args[0], seed, err)
		return 1
	}
	// The database is not closed: its log stays behind, as after a power cut.
	return 0
}

func databaseFile(dir string) string { return filepath.Join(dir, "ledger.db") }

// openDatabase opens a database whose commits are durable when they return.
func openDatabase(dir string) (*sql.DB, error) {
	db, err := sql.Open("sqlite", "file:"+databaseFile(dir)+"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	_, err = db.Exec(`CREATE TABLE IF NOT EXISTS entry (id INTEGER PRIMARY KEY, body BLOB NOT NULL);
		CREATE TABLE IF NOT EXISTS total (entries INTEGER NOT NULL);
		INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM total)`)
	return db, err
}

// commitEntries writes one transaction and returns the highest entry.
func commitEntries(db *sql.DB, r *rand.Rand) (last int64, err error) {
	tx, err := db.Begin()
	if err != nil {
		return 0, err
	}
	defer tx.Rollback() //nolint:errcheck // nothing is left to do after a commit
	n := 1 + r.IntN(20)
	for range n {
		body := make([]byte, 50+r.IntN(3000))
		for i := range body {
			body[i] = byte(r.Uint32N(64))
		}
		if _, err := tx.Exec("INSERT INTO entry (body) VALUES (?)", body); err != nil {
			return 0, err
		}
	}
	if _, err := tx.Exec("UPDATE total SET entries = entries + ?", n); err != nil {
		return 0, err
	}
	if err := tx.QueryRow("SELECT max(id) FROM entry").Scan(&last); err != nil {
		return 0, err
	}
	if _, err := tx.Exec("UPDATE entry SET body = zeroblob(200) WHERE id = ?", 1+r.Int64N(last)); err != nil {
		return 0, err
	}
	return last, tx.Commit()
}

// checkDatabase opens the database in a restored file system. It must be whole
// and hold every entry up to least, and no half of a transaction.
func checkDatabase(t testing.TB, dir string, least int64) {
	t.Helper()
	db, err := openDatabase(dir)
	if err != nil {
		t.Fatalf("open the restored database: %v", err)
	}
	defer db.Close()
	var sound string
	var entries, last, total int64
	for query, to := range map[string][]any{
		"PRAGMA integrity_check":                  {&sound},
		"SELECT count(*), max(id) FROM entry":     {&entries, &last},
		"SELECT entries, count(*) - 1 FROM total": {&total, new(int64)},
	} {
		if err := db.QueryRow(query).Scan(to...); err != nil {
			t.Fatalf("restored database: %s: %v", query, err)
		}
	}
	if !strings.EqualFold(sound, "ok") || entries != total || last != entries || last < least {
		t.Fatalf("restored database: check %q, %d entries, last %d, total %d; %d were durable before the freeze",
			sound, entries, last, total, least)
	}
}
