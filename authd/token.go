package authd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"slices"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/proto/login"
	"sallyport/proto/proof"
)

// maxAttempts is how often a batch is composed again when the records changed
// meanwhile.
const maxAttempts = 4

// keyProtections are how an agent may say that it keeps its key.
var keyProtections = []string{"tpm", "secure_enclave", "keyring", "file"}

func sessionOver(err error) error {
	if !errors.Is(err, sallyport.ErrNotFound) {
		return err
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeLogin, Code: connect.ProblemLogin,
		Message: "the session is over", Hint: "run: agent login", Err: err,
	}
}

func (s *Server) nonce(c *call) error {
	nonce, err := s.vault.nonce(c.ctx())
	if err != nil {
		return err
	}
	s.writeJSON(c, login.Nonce{Nonce: nonce})
	return nil
}

// proven checks a proof by a device key and returns the key and the op that uses
// the proof's nonce up. It consumes nothing by itself.
func (s *Server) proven(ctx ctx, jws, action string, session sallyport.SessionID, csr []byte) (proof.Key, sallyport.Op, error) {
	var claims proof.Login
	key, err := proof.Verify(jws, proof.TypeLogin, &claims)
	if err != nil {
		return key, sallyport.Op{}, refusal("proof.invalid", "the device key's proof is not valid", err)
	}
	var wantHash []byte
	if action != actionLogout {
		sum := sha256.Sum256(csr)
		wantHash = sum[:]
	}
	if claims.Audience != s.public || claims.Action != action || claims.Session != session || !bytes.Equal(claims.CSRHash, wantHash) {
		return key, sallyport.Op{}, refusal("proof.invalid", "the device key's proof is for something else", nil)
	}
	use, err := s.vault.useNonce(ctx, claims.Nonce)
	if err != nil {
		return key, sallyport.Op{}, errReplayed(err)
	}
	return key, use, nil
}

// Values of proof.Login's Action.
const (
	actionToken  = "token"
	actionRenew  = "renew"
	actionLogout = "logout"
)

func errReplayed(err error) error {
	return refusal("proof.replayed", "the device key's proof is used up or too old", err)
}

// token redeems a code for a session. Whatever goes wrong, the code is burned.
func (s *Server) token(c *call) error {
	var req login.TokenRequest
	if err := readJSON(c, &req); err != nil {
		return err
	}
	var held pendingCode
	consume, err := s.vault.look(c.ctx(), forCode, req.Code, &held)
	if errors.Is(err, sallyport.ErrNotFound) {
		return errCodeGone(err)
	}
	if err != nil {
		return err
	}
	c.user = sallyport.UserID(held.Person.Subject)
	grant, err := s.redeem(c, req, held, consume)
	if err != nil {
		s.burn(c, consume)
		return err
	}
	s.writeJSON(c, grant)
	return nil
}

func errCodeGone(err error) error {
	return refusal("login.code_unknown", "the code is used up, expired, or not ours", err)
}

// burn consumes a code for nothing. A conflict means that it is gone already.
func (s *Server) burn(c *call, consume sallyport.Op) {
	_, err := s.deps.Records.Apply(context.WithoutCancel(c.ctx()), []sallyport.Op{consume})
	if err != nil && !errors.Is(err, sallyport.ErrConflict) {
		s.log.Warn("code not burned, it expires within a minute", "request_id", c.id, "error", err)
	}
}

func (s *Server) redeem(c *call, req login.TokenRequest, held pendingCode, consume sallyport.Op) (login.Grant, error) {
	if err := held.matches(req); err != nil {
		return login.Grant{}, err
	}
	key, useNonce, err := s.proven(c.ctx(), req.Proof, actionToken, "", req.CSR)
	if err != nil {
		return login.Grant{}, err
	}
	c.device = key.ID
	if subtle.ConstantTimeCompare([]byte(key.Thumbprint), []byte(held.Agent.Thumbprint)) != 1 {
		return login.Grant{}, refusal("login.key_mismatch", "the login was begun with another device key", nil)
	}
	o := opening{agent: held.Agent, person: held.Person, key: key, address: held.Address}
	if slices.Contains(keyProtections, req.KeyProtection) {
		o.keyProtection = req.KeyProtection
	}
	for range maxAttempts {
		made, err := s.compose(c.ctx(), o)
		if err != nil {
			return login.Grant{}, err
		}
		grant, err := s.grant(c, req.CSR, key, made.session, made.user)
		if err != nil {
			return login.Grant{}, err
		}
		if err := s.record(c, sallyport.AuditLogin, made.session); err != nil {
			return login.Grant{}, err
		}
		_, err = s.deps.Records.Apply(c.ctx(), append(made.batch, consume, useNonce))
		if err == nil {
			if err := s.caughtUp(c.ctx(), made); err != nil {
				return login.Grant{}, err
			}
			s.log.Info("login", "user", made.user.ID, "session", made.session.ID, "device", key.ID, "peer", c.r.RemoteAddr)
			return grant, nil
		}
		if err := s.stillUnused(c.ctx(), err, consume, useNonce); err != nil {
			return login.Grant{}, err
		}
	}
	return login.Grant{}, sallyport.ErrConflict
}

// matches compares what the browser's way and the agent's way say of the login.
func (p pendingCode) matches(req login.TokenRequest) error {
	sum := sha256.Sum256([]byte(req.CodeVerifier))
	challenge := base64.RawURLEncoding.EncodeToString(sum[:])
	if subtle.ConstantTimeCompare([]byte(challenge), []byte(p.Agent.Challenge)) != 1 {
		return refusal("login.verifier_mismatch", "the code belongs to another login", nil)
	}
	if req.RedirectURI != p.Agent.RedirectURI {
		return refusal("login.redirect_mismatch", "the code was sent elsewhere", nil)
	}
	return nil
}

// stillUnused turns a failed write into the reason, or nil if only the records
// around it changed and it may be tried again.
func (s *Server) stillUnused(ctx ctx, err error, consume, useNonce sallyport.Op) error {
	if !errors.Is(err, sallyport.ErrConflict) {
		return err
	}
	if _, err := s.deps.Records.Get(ctx, useNonce.Kind, useNonce.ID); err == nil {
		return errReplayed(sallyport.ErrConflict)
	} else if !errors.Is(err, sallyport.ErrNotFound) {
		return err
	}
	if consume.ID == "" {
		return nil
	}
	if _, err := s.deps.Records.Get(ctx, consume.Kind, consume.ID); errors.Is(err, sallyport.ErrNotFound) {
		return errCodeGone(err)
	} else if err != nil {
		return err
	}
	return nil
}

// record writes the audit record before what it records happens.
func (s *Server) record(c *call, kind string, session sallyport.Session) error {
	return s.deps.Audit.Append(c.ctx(), sallyport.AuditRecord{
		Type: kind, Time: s.now(), User: session.User, Session: session.ID, Device: session.Device,
		Peer: c.r.RemoteAddr, RequestID: c.id,
	})
}

// grant checks the certificate request and makes the answer to it.
func (s *Server) grant(c *call, csr []byte, device proof.Key, session sallyport.Session, user sallyport.User) (login.Grant, error) {
	rejected := func(err error) error {
		return refusal("csr.rejected", "the certificate request is refused", err)
	}
	pub, err := checkCSR(csr, connect.SessionURI(s.deps.Domain, session.ID))
	if err != nil {
		return login.Grant{}, rejected(err)
	}
	if pub.Equal(device.Public) {
		return login.Grant{}, rejected(errors.New("the device key is not for certificates"))
	}
	chain, life, err := s.issue(c.ctx(), pub, session)
	if err != nil {
		return login.Grant{}, err
	}
	gateways, err := s.gateways(c.ctx())
	if err != nil {
		return login.Grant{}, err
	}
	return login.Grant{
		Session: session.ID, User: user.ID, Email: user.Email, Name: user.Name, Domain: s.deps.Domain,
		Certificate: chain, RenewIn: life / 2, ExpiresIn: session.Expires.Sub(s.now()), Gateways: gateways,
	}, nil
}

// gateways are those of the current configuration; none before there is one.
func (s *Server) gateways(ctx ctx) ([]sallyport.GatewayInfo, error) {
	conf, _, err := get[sallyport.Config](ctx, s.deps.Records, sallyport.KindConfig, "current")
	if errors.Is(err, sallyport.ErrNotFound) {
		return []sallyport.GatewayInfo{}, nil
	}
	return conf.Gateways, err
}

// renew gives a live session its next certificate. No certificate is looked at,
// so it also works when the last one has expired.
func (s *Server) renew(c *call) error {
	var req login.RenewRequest
	if err := readJSON(c, &req); err != nil {
		return err
	}
	c.session = req.Session
	key, useNonce, err := s.proven(c.ctx(), req.Proof, actionRenew, req.Session, req.CSR)
	if err != nil {
		return err
	}
	for range maxAttempts {
		live, err := s.owned(c, req.Session, key)
		if err != nil {
			return err
		}
		batch := []sallyport.Op{useNonce}
		if end := s.sessionEnd(live.login, s.now().UTC()); s.session.Load().Idle > 0 && end.After(live.session.Expires) {
			live.session.Expires = end
			batch = append(batch, putSession(live.session, live.sessionAs))
		}
		grant, err := s.grant(c, req.CSR, key, live.session, live.user)
		if err != nil {
			return err
		}
		if err := s.record(c, sallyport.AuditRenewal, live.session); err != nil {
			return err
		}
		_, err = s.deps.Records.Apply(c.ctx(), batch)
		if err == nil {
			s.log.Debug("certificate renewed", "session", req.Session)
			s.writeJSON(c, grant)
			return nil
		}
		if err := s.stillUnused(c.ctx(), err, sallyport.Op{}, useNonce); err != nil {
			return err
		}
	}
	return sallyport.ErrConflict
}

// owned returns a live session that belongs to the device key.
func (s *Server) owned(c *call, id sallyport.SessionID, key proof.Key) (liveSession, error) {
	live, err := s.liveSession(c.ctx(), id)
	if err != nil {
		return live, err
	}
	c.user, c.device = live.session.User, key.ID
	if live.session.Device != key.ID {
		return live, refusal("proof.wrong_key", "the session belongs to another device key", nil)
	}
	return live, nil
}

// logout ends a session, and its login's others with single_logout. A session
// that is over already is no error.
func (s *Server) logout(c *call) error {
	var req login.LogoutRequest
	if err := readJSON(c, &req); err != nil {
		return err
	}
	c.session = req.Session
	key, useNonce, err := s.proven(c.ctx(), req.Proof, actionLogout, req.Session, nil)
	if err != nil {
		return err
	}
	for range maxAttempts {
		session, _, err := get[sallyport.Session](c.ctx(), s.deps.Records, sallyport.KindSession, string(req.Session))
		if errors.Is(err, sallyport.ErrNotFound) {
			c.w.WriteHeader(http.StatusNoContent)
			return nil
		}
		if err != nil {
			return err
		}
		c.user, c.device = session.User, key.ID
		if session.Device != key.ID {
			return refusal("proof.wrong_key", "the session belongs to another device key", nil)
		}
		if err := s.record(c, sallyport.AuditLogout, session); err != nil {
			return err
		}
		_, err = s.deps.Records.Apply(c.ctx(), append(s.ending(session), useNonce))
		if err == nil {
			s.log.Info("logout", "user", session.User, "session", session.ID)
			c.w.WriteHeader(http.StatusNoContent)
			return nil
		}
		if err := s.stillUnused(c.ctx(), err, sallyport.Op{}, useNonce); err != nil {
			return err
		}
	}
	return sallyport.ErrConflict
}

// ending returns the ops that end a session: a missing login ends all of its
// sessions.
func (s *Server) ending(session sallyport.Session) []sallyport.Op {
	batch := []sallyport.Op{{Kind: sallyport.KindSession, ID: string(session.ID), Delete: true}}
	if s.session.Load().SingleLogout {
		batch = append(batch,
			sallyport.Op{Kind: sallyport.KindLogin, ID: string(session.Login), Delete: true},
			sallyport.Op{Kind: sallyport.KindIDPToken, ID: string(session.Login), Delete: true})
	}
	return batch
}
