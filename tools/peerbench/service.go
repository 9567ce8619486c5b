package main

import (
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"time"
)

// The first byte of a connection names what the service does with it.
const (
	modeUp   = 'U' // + uint16 ramp ms, uint16 window ms: counts what arrives in that window, answers uint64 bytes, uint64 ns
	modeDown = 'D' // writes until the client closes
	modeEcho = 'E' // + uint32 size: sends each message of that size back
	modeOpen = 'P' // answers that byte and waits for the end
)

const chunk = 128 << 10 // bytes of one read or write of a bulk load

func serverVerb(args []string) error {
	fs := flag.NewFlagSet("server", flag.ExitOnError)
	addr := fs.String("addr", "127.0.0.1:9000", "where to listen")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	for {
		c, err := ln.Accept()
		if err != nil { // out of descriptors, or the client was quicker
			time.Sleep(5 * time.Millisecond)
			continue
		}
		go serve(c)
	}
}

func serve(c net.Conn) {
	defer c.Close()
	var head [5]byte
	if _, err := io.ReadFull(c, head[:1]); err != nil {
		return
	}
	switch head[0] {
	case modeOpen:
		c.Write(head[:1])
		io.ReadFull(c, head[:1])
		return
	case modeDown:
		for buf := make([]byte, chunk); ; {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}
	if _, err := io.ReadFull(c, head[1:]); err != nil {
		return
	}
	switch head[0] {
	case modeUp:
		ramp := time.Duration(binary.BigEndian.Uint16(head[1:])) * time.Millisecond
		window := time.Duration(binary.BigEndian.Uint16(head[3:])) * time.Millisecond
		count(c, ramp, window)
	case modeEcho:
		for buf := make([]byte, binary.BigEndian.Uint32(head[1:])); ; {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}
}

// count reads and answers how much came in the window after the ramp.
func count(c net.Conn, ramp, window time.Duration) {
	var answer [16]byte
	n, took, err := readFor(c, ramp, window)
	if err != nil {
		return
	}
	binary.BigEndian.PutUint64(answer[:8], uint64(n))
	binary.BigEndian.PutUint64(answer[8:], uint64(took))
	c.Write(answer[:])
	// What is still on its way must be read, or the answer is lost in a reset.
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	io.Copy(io.Discard, c)
}

// readFor throws away what comes during the ramp and counts what comes in the
// window after it.
func readFor(c net.Conn, ramp, window time.Duration) (n int64, took time.Duration, err error) {
	buf := make([]byte, chunk)
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	for start := time.Now(); time.Since(start) < ramp; {
		if _, err := c.Read(buf); err != nil {
			return 0, 0, err
		}
	}
	start := time.Now()
	c.SetReadDeadline(start.Add(window))
	for time.Since(start) < window {
		k, err := c.Read(buf)
		if n += int64(k); isTimeout(err) {
			break
		} else if err != nil {
			return n, time.Since(start), err
		}
	}
	took = time.Since(start)
	c.SetReadDeadline(time.Time{})
	return n, took, nil
}
