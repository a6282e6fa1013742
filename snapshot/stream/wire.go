// SPDX-License-Identifier: BSD-2-Clause

package stream

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/dsync-backup/dsync-backup/kernel"
)

// ProtocolVersion is that of the conversation between `sync` and `merge
// --serve`: Hello, Request, sums if they were asked for, the stream, Reply.
const ProtocolVersion = 1

// maxLine bounds a message.
const maxLine = 64 << 10

// Hello is what the target says first.
type Hello struct {
	Protocol int    `json:"protocol"`
	Target   string `json:"target"`
	// Known: the target was written by merge before, and is what merge left.
	Known    bool            `json:"known"`
	Source   string          `json:"source,omitempty"`
	Position kernel.Position `json:"position"` // zero if it is at none
	// Partly is how far a merge that did not end may have brought parts of it;
	// Position is then where it was before.
	Partly     kernel.Position `json:"partly"`
	Incomplete bool            `json:"incomplete"`
	Holds      string          `json:"holds,omitempty"`  // what is there, if it is not known
	Reason     string          `json:"reason,omitempty"` // why its position does not count
	Size       int64           `json:"size"`
	File       bool            `json:"file"`  // which can be made larger
	Error      string          `json:"error"` // why there is no target; nothing follows
}

// Request is the answer to Hello.
type Request struct {
	Sums int64 `json:"sums"` // bytes of the device to send the sums of first, or -1
}

// Reply is the target's last word.
type Reply struct {
	Error    string          `json:"error"`
	Position kernel.Position `json:"position"` // durable
	Written  int64           `json:"bytes_written"`
	Zeroed   int64           `json:"bytes_zeroed"`
}

// Send writes a message as one line.
func Send(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		_, err = w.Write(append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("talk to the other end: %w", err)
	}
	return nil
}

// Receive reads a message. The reader must be the one that everything else is
// read from, too.
func Receive(r *bufio.Reader, v any) error {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxLine {
			return errors.New("the other end does not speak this protocol: is it dsync-backup of the same release?")
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("the other end hung up: %w", io.ErrUnexpectedEOF)
		}
		if err != nil {
			return fmt.Errorf("hear from the other end: %w", err)
		}
		break
	}
	if err := json.Unmarshal(line, v); err != nil {
		return fmt.Errorf("the other end does not speak this protocol (is it dsync-backup of the same release?): %w", err)
	}
	return nil
}
