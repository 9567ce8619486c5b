package sallyport

import (
	"context"
	"time"
)

// Names of the facts that an agent collects. A fact that the machine cannot
// know is absent, never guessed.
const (
	FactOS            = "os"             // string: linux, darwin, windows
	FactOSVersion     = "os_version"     // string: dotted numbers
	FactKernel        = "kernel"         // string
	FactAgentVersion  = "agent_version"  // string: semantic version
	FactDiskEncrypted = "disk_encrypted" // bool: the root file system lies on encrypted storage
	FactFirewall      = "firewall"       // bool: a packet filter with an input policy is loaded
	FactScreenLock    = "screen_lock"    // bool
	FactSecureBoot    = "secure_boot"    // bool
	FactKeyProtection = "key_protection" // string: tpm, secure_enclave, keyring, file
)

// Sources of facts. A fact counts only if its source is in
// policyd.posture_sources or the criterion names the source.
const (
	SourceOS       = "os"       // read from the operating system by the agent
	SourceFile     = "file"     // read from --posture-file
	SourceAttested = "attested" // proved by hardware
)

// Fact is one thing known about a device.
type Fact struct {
	// Value is a bool, a string or a float64 (JSON's scalars).
	Value any `json:"value"`
	// At is when it was read, by the clock of whoever read it.
	At time.Time `json:"at"`
	// Source is SourceOS, SourceFile or SourceAttested.
	Source string `json:"source"`
}

// PostureReport is what an agent signs with its device key and sends to the
// gateway (POST /v1/posture) as a compact JWS; see proto/proof. A report
// replaces the earlier one of the same device.
type PostureReport struct {
	Device  DeviceID  `json:"device"`
	Session SessionID `json:"session"`
	// Sequence grows with every report of a device: milliseconds since 1970 when
	// the agent made it, or one more than the last. policyd refuses one that is
	// not above the last it accepted, so a recorded report is worth nothing.
	Sequence int64           `json:"sequence"`
	Facts    map[string]Fact `json:"facts"`
}

// PostureSink takes signed posture reports. It returns after the report governs
// decisions, so the next question already sees it. A refused report returns an
// *Error with a posture.* code and leaves the earlier one as it was.
type PostureSink interface {
	ReportPosture(ctx context.Context, session SessionID, jws string) error
}
