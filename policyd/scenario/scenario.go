// Package scenario reads and runs *.policytest.yaml: who there is, what they ask
// for, and what a policy has to answer. It owns the format (strict: an unknown key
// or a wrong type makes a file unreadable, with line and column) and turns what a
// test says into the records and the request that policyd knows. It decides
// nothing: policyd.Offline does, with the code of the daemon.
//
// # What a test need not say
//
//	no target              tcp://target.example:443
//	no time                the latest moment that given names (created, at), else now
//	no ip                  the address is unknown
//	no session             nobody asks
//	user not in users      a user with that id and nothing else
//	device not in devices  the session has no device
//	no directory entry     groups are unknown; one without groups: there are none
//	session's expires      it never ends
//	session's created      its age is unknown
//	fact's at, source      at the time of the request, os
//	mcp_tool alone         mcp_method is tools/call
//
// The device's report is received at the time of the request, so posture_ttl,
// which counts from a report, never runs out; a fact's age counts from its at, for
// max_age. A client certificate is presented, and valid if it is presented, unless
// the test says otherwise.
package scenario

import (
	"fmt"
	"time"

	"sallyport"
)

// Outcome is what a test expects, or gets.
type Outcome string

// The outcomes. A target that does not exist, or hides itself, counts as Deny.
const (
	Allow     Outcome = "allow"
	Deny      Outcome = "deny"
	Login     Outcome = "login"
	LoadError Outcome = "load_error"
)

// File is one test file.
type File struct {
	Path  string
	Tests []Test
}

// Test is one question and the answer it should get.
type Test struct {
	Name string
	// Line and Column are where it stands in its file.
	Line, Column int
	// Policy is its own or the file's; nil: the site's routes decide.
	Policy  *Policy
	Given   Given // the file's and its own
	Request Request
	Expect  Outcome
	// Rule is the rule that has to decide; empty: any.
	Rule string
}

// Policy is a policy's text, and where it stands.
type Policy struct {
	// File holds it: the test file or its policy_file.
	File string
	// Err is policy.Errors with the places of File; nil: it loads.
	Err error

	text  string
	place func(line, column int) (int, int) // of text → of File
}

// Given are the people and things of a test.
type Given struct {
	Users     []sallyport.User
	Directory []sallyport.DirectoryUser
	Sessions  []sallyport.Session // without Login
	Devices   []Device
	Records   []sallyport.External
}

// Device is a device and what it reported.
type Device struct {
	sallyport.Device
	// Facts is nil if it never reported. A fact without At is as fresh as the
	// request.
	Facts map[string]sallyport.Fact
}

// Request is a question and when it is asked.
type Request struct {
	sallyport.Request
	// Time is zero if the test does not say it.
	Time time.Time
}

// Error is why a file cannot be read.
type Error struct {
	File         string
	Line, Column int
	Message      string
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

// defaultTarget is asked for by tests that name none. It exists nowhere (RFC
// 6761, section 6.5).
var defaultTarget = sallyport.Target{Network: sallyport.TCP, Host: "target.example", Port: 443}
