package gateway

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

const (
	// pingEvery is how often an event stream says that it lives.
	pingEvery = 10 * time.Second
	// maxSubscribers bounds the event streams of one session.
	maxSubscribers = 64
	// maxQueued bounds the events that wait for one slow reader; more are lost,
	// and what they told of is over anyway.
	maxQueued = 1 << 15
	// eventWrite is how long a reader may take to take what is written.
	eventWrite = 30 * time.Second
)

// hub hands events to the event streams (/v1/events) of their session. The zero
// hub is ready.
type hub struct {
	mu   sync.Mutex
	subs map[sallyport.SessionID]map[*subscriber]struct{}
}

// subscriber is one event stream.
type subscriber struct {
	conn tunnel.ServerConn
	wake chan struct{} // holds one

	mu    sync.Mutex
	queue []queued
}

// queued is an event, or a mark that is closed once everything before it has
// been written.
type queued struct {
	event   connect.Event
	flushed chan struct{}
}

// subscribe opens a stream; ok is false if the session has too many.
func (h *hub) subscribe(session sallyport.SessionID, c tunnel.ServerConn) (sub *subscriber, ok bool) {
	sub = &subscriber{conn: c, wake: make(chan struct{}, 1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.subs[session]) >= maxSubscribers {
		return nil, false
	}
	if h.subs == nil {
		h.subs = make(map[sallyport.SessionID]map[*subscriber]struct{})
	}
	if h.subs[session] == nil {
		h.subs[session] = make(map[*subscriber]struct{})
	}
	h.subs[session][sub] = struct{}{}
	return sub, true
}

func (h *hub) unsubscribe(session sallyport.SessionID, sub *subscriber) {
	h.mu.Lock()
	delete(h.subs[session], sub)
	if len(h.subs[session]) == 0 {
		delete(h.subs, session)
	}
	h.mu.Unlock()
	for _, q := range sub.take() { // nobody waits for what will not be written
		if q.flushed != nil {
			close(q.flushed)
		}
	}
}

// publish hands e to every stream of the session. It does not wait.
func (h *hub) publish(session sallyport.SessionID, e connect.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for sub := range h.subs[session] {
		sub.put(queued{event: e})
	}
}

// broadcast hands e to every stream of every session.
func (h *hub) broadcast(e connect.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, subs := range h.subs {
		for sub := range subs {
			sub.put(queued{event: e})
		}
	}
}

// flush returns a channel for each stream of the session that is closed once
// everything published so far has been written to it, by the connection that the
// stream is on.
func (h *hub) flush(session sallyport.SessionID) map[tunnel.ServerConn]chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	marks := make(map[tunnel.ServerConn]chan struct{}, len(h.subs[session]))
	for sub := range h.subs[session] {
		mark := make(chan struct{})
		sub.put(queued{flushed: mark})
		marks[sub.conn] = mark
	}
	return marks
}

func (s *subscriber) put(q queued) {
	s.mu.Lock()
	full := len(s.queue) >= maxQueued && q.flushed == nil
	if !full {
		s.queue = append(s.queue, q)
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *subscriber) take() []queued {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.queue
	s.queue = nil
	return q
}

// serve writes the stream to w until ctx ends or the reader is gone.
func (s *subscriber) serve(ctx context.Context, w http.ResponseWriter, hello connect.Event) {
	w.Header().Set("Content-Type", "application/jsonl")
	w.WriteHeader(http.StatusOK)
	out := http.NewResponseController(w)
	if s.write(w, out, []queued{{event: hello}}) != nil {
		return
	}
	ping := time.NewTicker(pingEvery)
	defer ping.Stop()
	for {
		var lines []queued
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
			lines = s.take()
		case <-ping.C:
			lines = []queued{{event: connect.Event{Type: connect.EventPing}}}
		}
		if s.write(w, out, lines) != nil {
			return
		}
	}
}

func (s *subscriber) write(w http.ResponseWriter, out *http.ResponseController, lines []queued) error {
	defer func() {
		for _, q := range lines {
			if q.flushed != nil {
				close(q.flushed)
			}
		}
	}()
	out.SetWriteDeadline(time.Now().Add(eventWrite)) // a carrier that has none bounds its streams itself
	enc := json.NewEncoder(w)
	for _, q := range lines {
		if q.flushed != nil {
			continue
		}
		if err := enc.Encode(q.event); err != nil {
			return err
		}
	}
	return out.Flush()
}
