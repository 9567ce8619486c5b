package main

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// openers is how many connections are opened at a time.
const openers = 16

func idleVerb(args []string) error {
	c := newCommon("idle")
	counts := c.fs.String("counts", "1000,9500", "how many connections to hold, one stage after the other")
	rest := c.fs.Duration("rest", 2*time.Second, "how long to wait before memory is read")
	tunnel, r, err := c.parse(args)
	if err != nil {
		return err
	}
	first, err := c.client.open()
	if err != nil {
		return fmt.Errorf("no way through: %w", err)
	}
	first.Close()
	time.Sleep(time.Second)
	base := tunnel.rss()
	r.M["rss_kb_0"] = base
	var held []net.Conn
	for stage := range strings.SplitSeq(*counts, ",") {
		want, err := strconv.Atoi(stage)
		if err != nil {
			return fmt.Errorf("counts: %w", err)
		}
		start := time.Now()
		more, err := c.client.hold(want - len(held))
		held = append(held, more...)
		r.fail(stage, err)
		r.M["open_s_"+stage] = time.Since(start).Seconds()
		r.M["held_"+stage] = float64(len(held))
		time.Sleep(*rest)
		now := tunnel.rss()
		r.M["rss_kb_"+stage] = now
		if len(held) > 0 {
			r.M["bytes_per_conn_"+stage] = (now - base) * 1024 / float64(len(held))
		}
		before := tunnel.cpu()
		time.Sleep(*rest)
		r.M["idle_cpu_pct_"+stage] = (tunnel.cpu() - before) / rest.Seconds() * 100
		if err := r.print(); err != nil { // at once: a killed run still reports
			return err
		}
	}
	return nil // the connections end with the process
}

// hold opens n connections; err is the first failure.
func (c *client) hold(n int) (held []net.Conn, err error) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	todo := make(chan struct{}, max(n, 0))
	for range n {
		todo <- struct{}{}
	}
	close(todo)
	for range openers {
		wg.Go(func() {
			for range todo {
				conn, e := c.open()
				mu.Lock()
				if e == nil {
					held = append(held, conn)
				} else if err == nil {
					err = e
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return held, err
}
