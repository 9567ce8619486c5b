package lane

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/net/http/httpproxy"

	"sallyport/internal/localhost"
	"sallyport/tunnel"
)

// dialer makes TLS connections to one gateway.
type dialer struct {
	endpoint tunnel.Endpoint
	tls      *tls.Config
	tcp      func(ctx context.Context, network, addr string) (net.Conn, error)
	// proxied is false if the caller brought its own way of dialling.
	proxied bool
}

func newDialer(cfg tunnel.DialConfig) (*dialer, error) {
	endpoint, err := tunnel.EndpointOf(cfg.Gateway)
	if err != nil {
		return nil, err
	}
	conf := cfg.TLS.Clone()
	conf.MinVersion = tls.VersionTLS13
	conf.NextProtos = []string{NextProto}
	conf.ServerName = endpoint.Host
	conf.ClientSessionCache = nil
	d := &dialer{endpoint: endpoint, tls: conf, tcp: cfg.DialContext}
	if d.tcp == nil {
		d.tcp, d.proxied = new(net.Dialer).DialContext, true
	}
	return d, nil
}

// dial returns a connection whose handshake is complete on this side; whether
// the gateway takes the certificate shows at the first read.
func (d *dialer) dial(ctx context.Context) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnel.HandshakeTimeout)
	defer cancel()
	c, err := tunnel.DialAny(ctx, d.endpoint.Addresses, func(ctx context.Context, address string) (*tls.Conn, error) {
		raw, err := d.reach(ctx, address)
		if err != nil {
			return nil, err
		}
		return handshake(ctx, raw, d.tls)
	})
	if err != nil {
		return nil, tunnel.DialFailure(d.endpoint.Authority, err)
	}
	if c.ConnectionState().NegotiatedProtocol != NextProto {
		c.Close()
		return nil, tunnel.DialFailure(d.endpoint.Authority, errors.New("the server does not speak http/1.1"))
	}
	return c, nil
}

func handshake(ctx context.Context, raw net.Conn, conf *tls.Config) (*tls.Conn, error) {
	c := tls.Client(Socket(raw), conf)
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// reach opens the way to address: directly, or through the proxy that the
// environment names (HTTPS_PROXY, NO_PROXY).
func (d *dialer) reach(ctx context.Context, address string) (net.Conn, error) {
	proxy, err := d.proxyFor()
	if err != nil {
		return nil, err
	}
	if proxy == nil {
		return d.tcp(ctx, "tcp", address)
	}
	c, err := d.throughProxy(ctx, proxy, address)
	if err != nil {
		return nil, fmt.Errorf("proxy %s: %w", proxy.Host, err)
	}
	return c, nil
}

func (d *dialer) proxyFor() (*url.URL, error) {
	if !d.proxied || localhost.Is(d.endpoint.Host) {
		return nil, nil
	}
	return httpproxy.FromEnvironment().ProxyFunc()(&url.URL{Scheme: "https", Host: d.endpoint.Authority})
}

func (d *dialer) throughProxy(ctx context.Context, proxy *url.URL, address string) (net.Conn, error) {
	port := proxy.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[proxy.Scheme]
	}
	if port == "" {
		return nil, fmt.Errorf("scheme %q is not supported (http, https)", proxy.Scheme)
	}
	c, err := d.tcp(ctx, "tcp", net.JoinHostPort(proxy.Hostname(), port))
	if err != nil {
		return nil, err
	}
	if proxy.Scheme == "https" {
		secure, err := handshake(ctx, c, &tls.Config{ServerName: proxy.Hostname(), NextProtos: []string{NextProto}})
		if err != nil {
			return nil, err
		}
		c = secure
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	err = askProxy(c, proxy.User, address)
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// askProxy sends CONNECT and reads the answer byte by byte: what follows it
// belongs to the TLS stream inside.
func askProxy(c net.Conn, user *url.Userinfo, address string) error {
	request := "CONNECT " + address + " HTTP/1.1\r\nHost: " + address + "\r\n"
	if user != nil {
		password, _ := user.Password()
		request += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)) + "\r\n"
	}
	if _, err := c.Write([]byte(request + "\r\n")); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(&oneByte{c: c, left: tunnel.MaxHead}, 16), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the proxy answered %s", resp.Status)
	}
	return nil
}

// oneByte reads single bytes, so that a buffered reader takes none too many.
type oneByte struct {
	c    net.Conn
	left int
}

func (r *oneByte) Read(b []byte) (int, error) {
	if r.left--; r.left < 0 {
		return 0, errHeadTooLarge
	}
	return r.c.Read(b[:min(1, len(b))])
}
