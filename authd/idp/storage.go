package idp

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"sync"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"sallyport"
)

const (
	signingAlg  = jose.ES256
	requestLife = 10 * time.Minute
	tokenLife   = time.Minute // authd reads the ID token at once and uses no other
	maxRequests = 10_000      // logins under way; the oldest give way
)

// Errors that op turns into answers.
var (
	errGone        = errors.New("no such login under way")
	errUnsupported = errors.New("not supported by the embedded provider")
)

// storage is what op asks for: logins under way, and one signing key. The methods
// for flows that the provider does not serve refuse.
type storage struct {
	provider *Provider
	key      *ecdsa.PrivateKey
	keyID    string

	mu       sync.Mutex // guards what follows, and the requests in it
	requests map[string]*request
	order    []string // ids by age
	codes    map[[32]byte]*request
}

// request is one login under way. It implements op.AuthRequest. What stands
// above the blank line never changes; the rest is guarded by storage.mu.
type request struct {
	id, clientID, redirectURI string
	state, nonce, challenge   string
	scopes                    []string
	started                   time.Time

	browser  [32]byte // hash of the cookie; zero: not bound yet
	subject  string   // set once the password was right
	authTime time.Time
	code     [32]byte // hash of the one code given out; zero: none yet
}

func newStorage(p *Provider) (*storage, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("idp: signing key: %w", err)
	}
	return &storage{
		provider: p, key: key, keyID: sallyport.NewID("k"),
		requests: make(map[string]*request), codes: make(map[[32]byte]*request),
	}, nil
}

// live needs the lock.
func (s *storage) live(id string) (*request, bool) {
	r, ok := s.requests[id]
	if !ok || s.provider.cfg.Now().Sub(r.started) > requestLife {
		return nil, false
	}
	return r, true
}

// bind ties a login to the browser that shows its form, if it is not another's.
func (s *storage) bind(id, browser string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.live(id)
	if !ok || r.subject != "" {
		return false
	}
	sum := sha256.Sum256([]byte(browser))
	if r.browser == [32]byte{} {
		r.browser = sum
	}
	return subtle.ConstantTimeCompare(r.browser[:], sum[:]) == 1
}

func (s *storage) boundTo(id, browser string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.live(id)
	sum := sha256.Sum256([]byte(browser))
	return ok && r.subject == "" && subtle.ConstantTimeCompare(r.browser[:], sum[:]) == 1
}

// complete notes who logged in; only once.
func (s *storage) complete(id, subject string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.live(id)
	if !ok || r.subject != "" {
		return false
	}
	r.subject, r.authTime = subject, s.provider.cfg.Now()
	return true
}

// completed reports whether a password was right and no code was given out yet.
func (s *storage) completed(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.live(id)
	return ok && r.subject != "" && r.code == [32]byte{}
}

// CreateAuthRequest takes what Provider.authorize has let through. PKCE is
// checked again, since a code without it would be a bearer secret.
func (s *storage) CreateAuthRequest(_ context.Context, q *oidc.AuthRequest, _ string) (op.AuthRequest, error) {
	if q.CodeChallengeMethod != oidc.CodeChallengeMethodS256 || q.CodeChallenge == "" || q.RedirectURI != s.provider.cfg.RedirectURI {
		return nil, oidc.ErrInvalidRequest().WithDescription("PKCE with S256 is required")
	}
	r := &request{
		id: sallyport.NewSecret(), clientID: q.ClientID, redirectURI: q.RedirectURI, state: q.State, nonce: q.Nonce,
		challenge: q.CodeChallenge, scopes: q.Scopes, started: s.provider.cfg.Now(),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep()
	s.requests[r.id] = r
	s.order = append(s.order, r.id)
	return r, nil
}

// sweep forgets logins that are over or too many; it needs the lock.
func (s *storage) sweep() {
	for len(s.order) > 0 {
		if _, ok := s.live(s.order[0]); ok && len(s.order) < maxRequests {
			return
		}
		s.forget(s.order[0])
		s.order = s.order[1:]
	}
}

// forget needs the lock.
func (s *storage) forget(id string) {
	if r, ok := s.requests[id]; ok {
		delete(s.codes, r.code)
		delete(s.requests, id)
	}
}

func (s *storage) AuthRequestByID(_ context.Context, id string) (op.AuthRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.live(id)
	if !ok {
		return nil, errGone
	}
	snapshot := *r
	return &snapshot, nil
}

// SaveAuthCode gives out one code for a login, whoever asks how often.
func (s *storage) SaveAuthCode(_ context.Context, id, code string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.live(id)
	if !ok || r.subject == "" || r.code != [32]byte{} {
		return errGone
	}
	r.code = sha256.Sum256([]byte(code))
	s.codes[r.code] = r
	return nil
}

// AuthRequestByCode burns the code: op looks at verifier, client and redirect
// only after this, and whatever it finds, there is no second try.
func (s *storage) AuthRequestByCode(_ context.Context, code string) (op.AuthRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.codes[sha256.Sum256([]byte(code))]
	if !ok {
		return nil, errGone
	}
	_, live := s.live(r.id)
	s.forget(r.id)
	if !live {
		return nil, errGone
	}
	return r, nil
}

func (s *storage) DeleteAuthRequest(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(id)
	return nil
}

func (s *storage) CreateAccessToken(context.Context, op.TokenRequest) (string, time.Time, error) {
	return sallyport.NewID("t"), s.provider.cfg.Now().Add(tokenLife), nil
}

func (s *storage) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	if id != s.provider.cfg.ClientID {
		return nil, errors.New("unknown client")
	}
	return client{s.provider}, nil
}

func (s *storage) AuthorizeClientIDSecret(_ context.Context, id, secret string) error {
	if id != s.provider.cfg.ClientID || subtle.ConstantTimeCompare([]byte(secret), []byte(s.provider.secret)) != 1 {
		return errors.New("unknown client or wrong secret")
	}
	return nil
}

// SetUserinfoFromRequest puts the person into the ID token, as the configuration
// has them at this instant.
func (s *storage) SetUserinfoFromRequest(_ context.Context, info *oidc.UserInfo, r op.IDTokenRequest, _ []string) error {
	u, ok := s.provider.User(r.GetSubject())
	if !ok {
		return errGone
	}
	info.Subject, info.Name = u.ID, u.Name
	info.Email, info.EmailVerified = u.Email, oidc.Bool(u.Email != "")
	groups := u.Groups
	if groups == nil {
		groups = []string{}
	}
	info.AppendClaims("groups", groups)
	return nil
}

func (s *storage) SetUserinfoFromScopes(context.Context, *oidc.UserInfo, string, string, []string) error {
	return nil // op's documentation: use SetUserinfoFromRequest
}

func (s *storage) SigningKey(context.Context) (op.SigningKey, error) { return signingKey{s}, nil }

func (s *storage) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{signingAlg}, nil
}

func (s *storage) KeySet(context.Context) ([]op.Key, error) { return []op.Key{publicKey{s}}, nil }

// signingKey and publicKey are the two halves as op wants them.
type signingKey struct{ *storage }

func (k signingKey) SignatureAlgorithm() jose.SignatureAlgorithm { return signingAlg }
func (k signingKey) Key() any                                    { return k.key }
func (k signingKey) ID() string                                  { return k.keyID }

type publicKey struct{ *storage }

func (k publicKey) Algorithm() jose.SignatureAlgorithm { return signingAlg }
func (k publicKey) Use() string                        { return "sig" }
func (k publicKey) Key() any                           { return k.key.Public() }
func (k publicKey) ID() string                         { return k.keyID }

// What op's storage has beyond the code flow.

func (s *storage) CreateAccessAndRefreshTokens(context.Context, op.TokenRequest, string) (string, string, time.Time, error) {
	return "", "", time.Time{}, errUnsupported
}

func (s *storage) TokenRequestByRefreshToken(context.Context, string) (op.RefreshTokenRequest, error) {
	return nil, errUnsupported
}

func (s *storage) TerminateSession(context.Context, string, string) error { return errUnsupported }

func (s *storage) RevokeToken(context.Context, string, string, string) *oidc.Error {
	return oidc.ErrInvalidRequest()
}

func (s *storage) GetRefreshTokenInfo(context.Context, string, string) (string, string, error) {
	return "", "", op.ErrInvalidRefreshToken
}

func (s *storage) SetUserinfoFromToken(context.Context, *oidc.UserInfo, string, string, string) error {
	return errUnsupported
}

func (s *storage) SetIntrospectionFromToken(context.Context, *oidc.IntrospectionResponse, string, string, string) error {
	return errUnsupported
}

func (s *storage) GetPrivateClaimsFromScopes(context.Context, string, string, []string) (map[string]any, error) {
	return nil, nil
}

func (s *storage) GetKeyByIDAndClientID(context.Context, string, string) (*jose.JSONWebKey, error) {
	return nil, errUnsupported
}

func (s *storage) ValidateJWTProfileScopes(context.Context, string, []string) ([]string, error) {
	return nil, errUnsupported
}

// op.AuthRequest.

func (r *request) GetID() string          { return r.id }
func (r *request) GetACR() string         { return "" }
func (r *request) GetAMR() []string       { return []string{"pwd"} } // RFC 8176
func (r *request) GetAudience() []string  { return nil }             // op adds the client
func (r *request) GetAuthTime() time.Time { return r.authTime }
func (r *request) GetClientID() string    { return r.clientID }
func (r *request) GetCodeChallenge() *oidc.CodeChallenge {
	return &oidc.CodeChallenge{Challenge: r.challenge, Method: oidc.CodeChallengeMethodS256}
}
func (r *request) GetNonce() string                   { return r.nonce }
func (r *request) GetRedirectURI() string             { return r.redirectURI }
func (r *request) GetResponseType() oidc.ResponseType { return oidc.ResponseTypeCode }
func (r *request) GetResponseMode() oidc.ResponseMode { return "" }
func (r *request) GetScopes() []string                { return r.scopes }
func (r *request) GetState() string                   { return r.state }
func (r *request) GetSubject() string                 { return r.subject }
func (r *request) Done() bool                         { return r.subject != "" }
