package style

// Layer says what packages under a prefix may import of ours, beside what lies
// under the same prefix. The longest prefix that fits a package is its layer.
type Layer struct {
	Prefix string   // directory from the top of the tree; "." is the root package only
	May    []string // prefixes; "*" is everything
}

// layers are DESIGN.md, section 2. Servers never import each other: none of
// agent, gateway, authd, policyd, cached stands in a May of the others.
var layers = []Layer{
	{".", nil},
	{"internal", nil},
	{"proto/control", []string{".", "internal"}},
	{"proto/connect", []string{"."}},
	{"proto/login", []string{".", "internal"}},
	{"proto/proof", []string{".", "internal"}},
	{"proto/local", []string{"."}},
	{"netstack", []string{"internal"}},
	{"audit", []string{".", "internal"}},
	{"tunnel", []string{".", "proto", "internal"}},
	{"tunnel/wg", []string{".", "proto", "internal", "netstack", "tunnel"}},
	{"agent", []string{".", "proto", "tunnel", "netstack", "internal"}},
	{"gateway", []string{".", "proto", "tunnel", "audit", "internal"}},
	{"authd", []string{".", "proto", "audit", "internal"}},
	{"policyd", []string{".", "proto", "audit", "internal"}},
	{"policyd/policy", []string{".", "internal"}}, // pure: no wire, no log
	{"cached", []string{".", "proto", "audit", "internal"}},
	{"cmd", []string{".", "internal", "proto", "netstack", "audit", "tunnel", "agent", "gateway", "authd", "policyd", "cached"}},
	{"integration", []string{"*"}},
}

// Owner says which packages may import a third-party module. Test files may
// import anything; so may test support, that is, packages whose name ends in
// "test".
type Owner struct {
	Module   string   // import path prefix
	Packages []string // prefixes; "*" is everybody
	// Hidden modules stay inside: the exported API of their owner does not
	// mention their types.
	Hidden bool
}

var owners = []Owner{
	{"github.com/quic-go/quic-go", []string{"tunnel/h3"}, true},
	{"gvisor.dev/gvisor", []string{"netstack"}, true},
	{"golang.zx2c4.com/wireguard", []string{"tunnel/wg"}, true},
	{"github.com/coreos/go-oidc/v3", []string{"internal/oidcrp"}, true},
	{"golang.org/x/oauth2", []string{"internal/oidcrp"}, true},
	{"github.com/zitadel/oidc/v3", []string{"authd/idp"}, true},
	{"github.com/mattn/go-sqlite3", []string{"cached/sqlite"}, true},
	{"github.com/jackc/pgx/v5", []string{"cached/postgres"}, true},
	{"google.golang.org/grpc", []string{"proto/control"}, true},
	{"google.golang.org/protobuf", []string{"proto/control"}, true},
	{"github.com/prometheus/client_golang", []string{"internal/telemetry"}, true},
	{"github.com/go-jose/go-jose/v4", []string{"proto/proof", "internal/oidcrp", "authd/idp"}, true},
	{"github.com/google/go-tpm", []string{"internal/tpmseal", "agent/keys"}, true},
	{"github.com/zalando/go-keyring", []string{"agent/keys"}, true},
	{"github.com/pkg/browser", []string{"agent/login"}, true},
	{"github.com/hashicorp/go-hclog", []string{"internal/logging"}, false}, // logging.Logger is hclog's
	{"github.com/spf13/cobra", []string{"cmd"}, false},
	{"github.com/spf13/pflag", []string{"cmd"}, false},
	{"go.yaml.in/yaml/v3", []string{"cmd/internal/config", "policyd/policy", "policyd/scenario"}, false}, // nodes with their lines
	{"cel.dev/cel-go", []string{"policyd/policy"}, true},
	{"golang.org/x/net/html", []string{"internal/browse"}, true},
	{"golang.org/x/net/http/httpproxy", []string{"tunnel/lane"}, true},
	{"golang.org/x/net/ipv4", []string{"tunnel/h3"}, true},
	{"golang.org/x/net/ipv6", []string{"tunnel/h3"}, true},
	{"golang.org/x/crypto/argon2", []string{"authd/idp"}, true},
	{"golang.org/x/crypto/chacha20poly1305", []string{"authd", "cached", "internal/keyring"}, true},
	{"golang.org/x/crypto/ssh", []string{"cmd/sallyport", "policyd/policy", "policyd/scenario", "integration"}, true},
	{"golang.org/x/term", []string{"cmd", "agent"}, true},

	{"golang.org/x/sync/errgroup", []string{"*"}, false},
	{"golang.org/x/sync/singleflight", []string{"agent"}, false},
	{"golang.org/x/sys/unix", []string{"*"}, false},
	{"golang.org/x/sys/windows", []string{"*"}, false},
	{"golang.org/x/time/rate", []string{"*"}, false},
}

// forbidden are words that stand in no Go file but tests: a switch that turns
// verification off will be used (SECURITY-CASES E3). They are written in two
// parts, so that this file may stay.
var forbidden = []string{"InsecureSkip" + "Verify", "insecure_skip" + "_verify", "insecure-skip" + "-verify"}
