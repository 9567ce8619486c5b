package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"sallyport/internal/logging"
	"sallyport/internal/tlsid"
)

// authInfo is what a connection has proved; gRPC hands it to each call.
type authInfo struct {
	credentials.CommonAuthInfo
	caller caller
}

func (authInfo) AuthType() string { return "sallyport" }

// callerOf returns who makes a call; ok is false if nobody has proved anything.
func callerOf(ctx context.Context) (caller, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, false
	}
	info, ok := p.AuthInfo.(authInfo)
	return info.caller, ok
}

// private is the security level of both kinds of connections: nobody else reads
// or writes on them.
var private = credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}

// tlsCredentials is mutual TLS, after which the peer must have a service's name.
type tlsCredentials struct {
	credentials.TransportCredentials
	domain string
	log    logging.Logger
}

func newTLSCredentials(conf *tls.Config, domain string, log logging.Logger) credentials.TransportCredentials {
	return tlsCredentials{credentials.NewTLS(conf), domain, log}
}

func (t tlsCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		t.log.Debug("handshake failed", "peer", raw.RemoteAddr().String(), "error", err)
		return nil, nil, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok {
		conn.Close()
		return nil, nil, errors.New("no TLS connection")
	}
	kind, name, err := tlsid.PeerService(tlsInfo.State, t.domain)
	if err != nil {
		conn.Close()
		t.log.Warn("certificate names no service", "peer", raw.RemoteAddr().String(), "error", err)
		return nil, nil, err
	}
	return conn, authInfo{private, caller{kind: kind, name: name}}, nil
}

func (t tlsCredentials) Clone() credentials.TransportCredentials {
	return tlsCredentials{t.TransportCredentials.Clone(), t.domain, t.log}
}

// unixCredentials let in who has the same uid as this process, or root. Both
// ends check: a client tells nothing to a socket that somebody else has put there.
type unixCredentials struct{ log logging.Logger }

func (u unixCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return u.handshake(raw)
}

func (u unixCredentials) ClientHandshake(_ context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return u.handshake(raw)
}

func (u unixCredentials) handshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, ok := raw.(*net.UnixConn)
	if !ok {
		raw.Close()
		return nil, nil, fmt.Errorf("connection from %s is no unix socket and has no TLS", raw.RemoteAddr())
	}
	uid, err := peerUID(conn)
	if err == nil && !trustedUID(uid, os.Geteuid()) {
		err = fmt.Errorf("uid %d at the other end of the socket is neither ours nor root", uid)
	}
	if err != nil {
		raw.Close()
		u.log.Warn("unix socket peer refused", "uid", uid, "error", err)
		return nil, nil, err
	}
	return raw, authInfo{private, caller{local: true, uid: uid}}, nil
}

func trustedUID(uid uint32, own int) bool { return uid == 0 || int64(uid) == int64(own) }

func (unixCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (u unixCredentials) Clone() credentials.TransportCredentials { return u }

func (unixCredentials) OverrideServerName(string) error { return nil }
