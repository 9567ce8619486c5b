package agent

// Version is the agent's version (semver.org); the build sets it with
// -ldflags "-X sallyport/agent.Version=…".
var Version = "0.1.0"
