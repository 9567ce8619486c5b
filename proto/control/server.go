package control

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/proto/control/internal/pb"
)

// Services is what a daemon offers. What is nil is not served.
type Services struct {
	Records    sallyport.Records
	Lister     sallyport.Lister
	Revoker    sallyport.Revoker
	Backuper   sallyport.Backuper
	Keys       sallyport.KeyKeeper // operators only
	Authorizer sallyport.Authorizer
	Explainer  sallyport.Explainer
	Changes    sallyport.Changes
	Posture    sallyport.PostureSink
}

// Server offers services on one listener.
type Server struct {
	grpc *grpc.Server
	log  logging.Logger
	// closing ends when the server is to stop; every stream ends with it.
	closing context.Context
	close   context.CancelFunc
}

// Limits of a server.
const (
	handshakeTimeout = 5 * time.Second
	drainTimeout     = 2 * time.Second
	maxStreams       = 20_000 // at once on one connection
)

// NewServer makes a server of s. With a TLS configuration (tlsid.ServerConfig)
// its callers are services of the trust domain, each with the rights of its
// kind. Without one it serves unix sockets only, and only this process's user
// and root, who may do everything.
func NewServer(tlsConf *tls.Config, domain string, s Services, log logging.Logger) *Server {
	srv := &Server{log: log}
	srv.closing, srv.close = context.WithCancel(context.Background())
	creds := grpc.Creds(unixCredentials{log})
	if tlsConf != nil {
		creds = grpc.Creds(newTLSCredentials(tlsConf, domain, log))
	}
	srv.grpc = grpc.NewServer(creds,
		grpc.UnaryInterceptor(srv.unary),
		grpc.StreamInterceptor(srv.stream),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		// A client that has frozen must not hold a stream, a lease or memory.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: Pulse, Timeout: Silence}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: Pulse, PermitWithoutStream: true}),
	)
	if s.Records != nil || s.Lister != nil {
		pb.RegisterRecordsServer(srv.grpc, &recordsServer{records: s.Records, lister: s.Lister})
	}
	if s.Authorizer != nil || s.Explainer != nil || s.Changes != nil || s.Posture != nil {
		pb.RegisterPolicyServer(srv.grpc, &policyServer{s: s})
	}
	if s.Keys != nil {
		pb.RegisterKeysServer(srv.grpc, &keysServer{keys: s.Keys})
	}
	if s.Revoker != nil {
		pb.RegisterRevokerServer(srv.grpc, &revokerServer{revoker: s.Revoker})
	}
	if s.Backuper != nil {
		pb.RegisterBackuperServer(srv.grpc, &backuperServer{backuper: s.Backuper})
	}
	return srv
}

// Serve accepts on ln until ctx ends, then tells clients to go, ends streams,
// lets calls finish for two seconds, and returns nil. It closes ln. A server
// serves once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	defer s.close()
	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(ln) }()
	select {
	case err := <-served:
		s.grpc.Stop()
		return err
	case <-ctx.Done():
	}
	s.close()
	force := time.AfterFunc(drainTimeout, s.grpc.Stop)
	defer force.Stop()
	s.grpc.GracefulStop()
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

func (s *Server) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if err := s.admit(ctx, info.FullMethod, request); err != nil {
		return nil, failureToWire(err)
	}
	response, err := handle(ctx, request)
	if err != nil {
		return nil, s.failed(err)
	}
	return response, nil
}

func (s *Server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if err := s.admit(stream.Context(), info.FullMethod, nil); err != nil {
		return failureToWire(err)
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(s.closing, cancel)()
	if err := handle(srv, &endingStream{stream, ctx}); err != nil {
		return s.failed(err)
	}
	return nil
}

// endingStream is a stream whose context also ends with the server.
type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *endingStream) Context() context.Context { return s.ctx }

func (s *Server) admit(ctx context.Context, method string, request any) error {
	who, ok := callerOf(ctx)
	if !ok {
		return forbidden(caller{}.String(), shortMethod(method))
	}
	if err := who.check(method, request); err != nil {
		s.log.Warn("call refused", "service", who.String(), "method", shortMethod(method), "error", err)
		return err
	}
	return nil
}

// failed is how a handler's error leaves. A call that ended because the server
// stops is one to try elsewhere, not one that somebody cancelled.
func (s *Server) failed(err error) error {
	if s.closing.Err() != nil && errors.Is(err, context.Canceled) {
		err = unavailable("this server", errors.New("shutting down"))
	}
	return failureToWire(err)
}
