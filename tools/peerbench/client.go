package main

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// patience is how long one connection may take for one step.
const patience = 10 * time.Second

// client is the load's near end.
type client struct {
	addr string
	ramp time.Duration // of a bulk load, before it is measured
}

func (c *client) dial() (net.Conn, error) { return net.DialTimeout("tcp", c.addr, patience) }

// bulk moves bytes over so many connections at once and returns MB/s (1e6), all
// of them together.
func (c *client) bulk(mode byte, streams int, window time.Duration) (rate float64, err error) {
	load := map[byte]func(time.Duration) (float64, error){modeUp: c.upload, modeDown: c.download}[mode]
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range streams {
		wg.Go(func() {
			r, e := load(window)
			mu.Lock()
			defer mu.Unlock()
			rate += r
			err = errors.Join(err, e)
		})
	}
	wg.Wait()
	return rate, err
}

func (c *client) upload(window time.Duration) (float64, error) {
	conn, err := c.dial()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	head := []byte{modeUp, 0, 0, 0, 0}
	binary.BigEndian.PutUint16(head[1:], uint16(c.ramp/time.Millisecond))
	binary.BigEndian.PutUint16(head[3:], uint16(window/time.Millisecond))
	if _, err := conn.Write(head); err != nil {
		return 0, err
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for buf := make([]byte, chunk); ; {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	}()
	var answer [16]byte
	conn.SetReadDeadline(time.Now().Add(window + 2*patience))
	_, err = io.ReadFull(conn, answer[:])
	conn.SetWriteDeadline(time.Now())
	<-sent
	if err != nil {
		return 0, err
	}
	return perSecond(int64(binary.BigEndian.Uint64(answer[:8])), time.Duration(binary.BigEndian.Uint64(answer[8:]))), nil
}

func (c *client) download(window time.Duration) (float64, error) {
	conn, err := c.dial()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{modeDown}); err != nil {
		return 0, err
	}
	n, took, err := readFor(conn, c.ramp, window)
	if err != nil {
		return 0, err
	}
	return perSecond(n, took), nil
}

// perSecond returns MB/s (1e6).
func perSecond(n int64, d time.Duration) float64 { return float64(n) / 1e6 / d.Seconds() }

// pingPong sends one message after the other and waits for each to come back. It
// returns the round trips in µs, sorted, without those of the first moment.
func (c *client) pingPong(size int, window time.Duration) (trips []float64, err error) {
	const warmUp = 60 * time.Millisecond
	conn, err := c.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	head := []byte{modeEcho, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(head[1:], uint32(size))
	if _, err := conn.Write(head); err != nil {
		return nil, err
	}
	buf := make([]byte, size)
	start := time.Now()
	for now := start; now.Sub(start) < window; {
		conn.SetDeadline(now.Add(patience))
		if _, err := conn.Write(buf); err != nil {
			return trips, err
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			return trips, err
		}
		end := time.Now()
		if now.Sub(start) > warmUp {
			trips = append(trips, micros(end.Sub(now)))
		}
		now = end
	}
	slices.Sort(trips)
	return trips, nil
}

// open opens a connection and waits for the service's first byte.
func (c *client) open() (net.Conn, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(2 * patience))
	b := []byte{modeOpen}
	if _, err = conn.Write(b); err == nil {
		_, err = io.ReadFull(conn, b)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, conn.SetDeadline(time.Time{})
}

// storm opens and closes connections, so many at once. It returns how long each
// took to its first byte in µs, sorted, how many came in a second, and how many
// failed.
func (c *client) storm(workers int, window time.Duration) (opens []float64, rate float64, failed int) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	start := time.Now()
	for range workers {
		wg.Go(func() {
			var mine []float64
			bad := 0
			for time.Since(start) < window {
				began := time.Now()
				conn, err := c.open()
				if err != nil {
					bad++
					time.Sleep(time.Millisecond)
					continue
				}
				mine = append(mine, micros(time.Since(began)))
				conn.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			opens = append(opens, mine...)
			failed += bad
		})
	}
	wg.Wait()
	rate = float64(len(opens)) / time.Since(start).Seconds()
	slices.Sort(opens)
	return opens, rate, failed
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// quantile returns that of sorted values; 0 if there are none.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
