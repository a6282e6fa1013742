// SPDX-License-Identifier: BSD-2-Clause

// Package wire is what the harness and its agent in the guest say to each
// other, over one stream that carries many commands at once.
package wire

import (
	"encoding/gob"
	"io"
	"sync"
)

// Port is the name of the virtio-serial port that carries the stream.
const Port = "dsync.agent"

// Window is how many bytes of standard input may be on their way to one command
// before the agent says that it took some.
const Window = 1 << 20

// Kinds of messages. The host sends the first four, the agent the others.
const (
	Start  Kind = iota + 1 // run Args with Env and Dir, as command ID
	Stdin                  // Data for command ID; none: end of file
	Signal                 // send signal Code to command ID
	Dump                   // write what tasks are blocked to the kernel log

	Ready  // the guest is up; Data is the kernel's release
	Stdout // Data from command ID
	Stderr
	Took // command ID took Code bytes of its standard input
	Exit // command ID ended: exit status Code (-1: it could not start, or a signal), Data says why
)

// Kind says what a message is about.
type Kind uint8

// Message is one message of either side.
type Message struct {
	Kind Kind
	ID   uint32
	Args []string
	Env  []string // added to the agent's own
	Dir  string
	Data []byte
	Code int
}

// Conn sends and receives messages. Send may be called from many goroutines,
// Receive from one.
type Conn struct {
	mu  sync.Mutex
	enc *gob.Encoder
	dec *gob.Decoder
}

// New returns a Conn over stream.
func New(stream io.ReadWriter) *Conn {
	return &Conn{enc: gob.NewEncoder(stream), dec: gob.NewDecoder(stream)}
}

// Send sends one message.
func (c *Conn) Send(m Message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.enc.Encode(m)
}

// Receive waits for the next message.
func (c *Conn) Receive() (Message, error) {
	var m Message
	err := c.dec.Decode(&m)
	return m, err
}
