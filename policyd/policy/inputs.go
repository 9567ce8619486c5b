package policy

import (
	"time"

	"sallyport"
)

// Inputs is what a decision looked at, for the audit log: with the audit's
// request it is enough to decide again, also by another policy that looks at
// nothing else. What was looked at and is not there stands as null.
type Inputs struct {
	// Now is the clock of the decision.
	Now time.Time `json:"now"`
	// Absent says why there was no live session.
	Absent string `json:"absent,omitempty"`

	Email  *string         `json:"email,omitempty"`
	Groups map[string]bool `json:"groups,omitempty"` // those that the rules name: is a member
	// GroupCount counts ids and names; NoDirectory: the directory knows nothing.
	GroupCount  int            `json:"group_count,omitempty"`
	NoDirectory bool           `json:"no_directory,omitempty"`
	Claims      map[string]any `json:"claims,omitempty"`
	// Device has no ID for a session without a device.
	Device *DeviceInput          `json:"device,omitempty"`
	Facts  map[string]*FactInput `json:"facts,omitempty"`
	Login  *LoginInput           `json:"login,omitempty"`
	// Records are the fields of external records, by type/id.
	Records map[string]map[string]any `json:"records,omitempty"`
	// Values are what CEL expressions refer to, by path: "user.claims.dept".
	Values map[string]any `json:"values,omitempty"`
}

// DeviceInput is what was looked at in the device's record.
type DeviceInput struct {
	ID       sallyport.DeviceID `json:"id"`
	Approved bool               `json:"approved"`
	Type     string             `json:"type,omitempty"`
}

// FactInput is a fact as it was looked at.
type FactInput struct {
	Value  any           `json:"value"`
	Source string        `json:"source"`
	Age    time.Duration `json:"age"` // nanoseconds
}

// LoginInput is how, and how long ago, the person logged in.
type LoginInput struct {
	Age         time.Duration `json:"age"` // nanoseconds; below zero: not known
	AuthMethods []string      `json:"auth_methods,omitempty"`
}
