package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sallyport/agent"
)

// options are all flags of all commands.
type options struct {
	profile     string
	output      string
	verbose     bool
	ca          string
	noBrowser   bool
	timeout     time.Duration
	keyStore    string
	allProfiles bool
	postureFile string
	transport   string
	kind        string
	all         bool
	watch       bool
	check       string
	decision    string
	locals      []string
	listens     []string
	stdio       bool
	allowUID    string
	exec        []string // behind --exec, cut off before the flags are read
	patience    time.Duration
}

// command is one row of the table.
type command struct {
	use, short, long, example string
	// min and max are how many arguments there may be; max < 0: any number.
	min, max int
	// flags adds the command's flags.
	flags func(f *pflag.FlagSet, o *options)
	run   func(s *shell, ctx context.Context, args []string) error
	// raw commands parse what follows themselves (ssh).
	raw bool
}

var rows = []command{
	{
		use: "login [URL]", short: "Log in through the browser", max: 1,
		long: `Log in through the browser.

The agent opens the login service's page in your browser and waits on a port of
127.0.0.1 for its answer. The address is always printed too. What the login
leaves on this machine opens nothing without the device key, which stays in the
system's keyring (or, where there is none, in a file that only you can read).`,
		example: `  agent login https://auth.corp.example
  agent login                              the same service again
  agent login auth.corp.example --ca company-ca.pem
  agent login --no-browser                 open the address yourself, anywhere on this machine`,
		flags: func(f *pflag.FlagSet, o *options) {
			f.StringVar(&o.ca, "ca", "", "PEM `FILE` with the authority that signs the login service's certificate")
			f.StringVar(&o.keyStore, "key-store", "", "where a new device key goes: `keyring` or file (default keyring, if there is one)")
			addAsk(f, o)
			addPosture(f, o)
		},
		run: runLogin,
	},
	{
		use: "logout", short: "End the session",
		long: `End the session.

The session ends at the login service, and what is open through it is cut within
a second. The device key stays.`,
		flags: func(f *pflag.FlagSet, o *options) {
			f.BoolVar(&o.allProfiles, "all-profiles", false, "log out of every profile")
		},
		run: runLogout,
	},
	{
		use: "whoami", short: "Show who you are logged in as",
		long:  `Show who you are logged in as, as the gateway sees you now.`,
		flags: addOnline, run: runWhoami,
	},
	{
		use: "extend", short: "Prolong the session by logging in ahead of time",
		long: `Prolong the session by logging in ahead of time.

The session stays the same one: nothing that is open is dropped.`,
		flags: addAsk, run: runExtend,
	},
	{
		use: "ls [QUERY]", short: "List what you may reach", max: 1,
		long: `List what you may reach.

QUERY keeps the targets that contain it. With --all also those that you may not
reach now, with the reason.`,
		example: `  agent ls
  agent ls db --kind tcp
  agent ls --all -o json`,
		flags: func(f *pflag.FlagSet, o *options) {
			f.StringVar(&o.kind, "kind", "", "only this `KIND`: tcp, udp, http or ssh")
			f.BoolVar(&o.all, "all", false, "also what you may not reach, with the reason")
			addOnline(f, o)
		},
		run: runLs,
	},
	{
		use: "connect TARGET…", short: "Open local ports to targets", max: -1,
		long: `Open local ports to targets.

A TARGET is a host and a port (db.internal:5432), a URL (postgres://db.internal/app),
or a short name from "agent ls" (db). Its local port is its own one if that is free
on 127.0.0.1, else one that stays the same for this target.

Only you may use the port: connections of other users of this machine are closed.
If a login is needed meanwhile, connections are held until it is done.`,
		example: `  agent connect db.internal:5432
  agent connect db.internal:5432 wiki
  agent connect -L 15432:db.internal:5432
  agent connect db --listen unix:/run/user/1000/db.sock
  agent connect db.internal:5432 --exec psql -h {host} -p {port} app
  ssh -o ProxyCommand='agent connect --stdio %h:%p' web.internal`,
		flags: func(f *pflag.FlagSet, o *options) {
			f.StringArrayVarP(&o.locals, "local", "L", nil, "`[ADDR:]PORT:TARGET` to open at that port; may be repeated")
			f.StringArrayVar(&o.listens, "listen", nil, "where the TARGET is to be reached: `ADDR:PORT`, unix:PATH, :0 for any free port, or - for --stdio")
			f.BoolVarP(&o.stdio, "stdio", "W", false, "carry standard input and output instead of a port")
			f.String("exec", "", "run `CMD` and its arguments when the ports are open, and end with it; must come last. {host}, {port} and {addr} stand for the first local end")
			f.StringVar(&o.allowUID, "allow-uid", "self", "`WHO` may connect on this machine: self, any, or user ids N,…")
			addOnline(f, o)
			addAsk(f, o)
		},
		run: runConnect,
	},
	{
		use: "ssh [USER@]HOST [SSH ARGS…]", short: "Log in to a host with the system's ssh", min: 1, max: -1, raw: true,
		long: `Log in to a host with the system's ssh.

Everything behind HOST goes to ssh as it stands. HOST may be a short name from
"agent ls"; the port is 22 unless ssh's -p says otherwise. ssh's own settings, keys
and known_hosts hold.`,
		example: `  agent ssh alice@web.internal
  agent ssh web -L 8080:localhost:80
  agent --profile work ssh web uptime`,
		flags: func(f *pflag.FlagSet, o *options) {
			addOnline(f, o)
			addAsk(f, o)
		},
		run: runSSH,
	},
	{
		use: "nc HOST PORT", short: "Carry standard input and output to a target", min: 2, max: 2,
		long:    `Carry standard input and output to a target, like nc(1).`,
		example: `  printf 'PING\r\n' | agent nc redis.internal 6379`,
		flags: func(f *pflag.FlagSet, o *options) {
			addOnline(f, o)
			addAsk(f, o)
		},
		run: runNc,
	},
	{
		use: "ps", short: "List the open local ports",
		long: `List the open local ports of all your agent processes.`,
		run:  runPs,
	},
	{
		use: "status", short: "Show session, gateway, posture and open ports",
		long: `Show session, gateway, posture and open ports.

With --check the exit code answers: "live" is 0 if there is a session that has not
ended, "ready" if the gateway also takes it now.`,
		flags: func(f *pflag.FlagSet, o *options) {
			f.BoolVar(&o.watch, "watch", false, "show it again each two seconds")
			f.StringVar(&o.check, "check", "", "only `WHAT`: live or ready")
			addOnline(f, o)
		},
		run: runStatus,
	},
	{
		use: "why TARGET", short: "Explain why a target is allowed or denied", min: 1, max: 1,
		long: `Explain why a target is allowed or denied now.

It says which rule decides, which conditions do not hold, and what would change
the answer. The exit code is 0 if the target is allowed, 4 if it is denied.`,
		example: `  agent why payroll.internal:443
  agent why db -o json`,
		flags: func(f *pflag.FlagSet, o *options) {
			f.StringVar(&o.decision, "decision", "", "the `ID` of an earlier decision, to say whether it is still the same")
			addOnline(f, o)
		},
		run: runWhy,
	},
	{
		use: "posture", short: "Show what the agent reports about this machine",
		long: `Show what the agent reports about this machine.

What the system does not tell is not in the list: nothing is guessed.`,
		flags: func(f *pflag.FlagSet, o *options) {
			f.BoolVar(&o.watch, "watch", false, "show it again when it changes")
			addPosture(f, o)
		},
		run: runPosture,
	},
	{
		use: "run", short: "Keep the session renewed and the posture reported",
		long: `Keep the session renewed and the posture reported, in the foreground.`,
		flags: func(f *pflag.FlagSet, o *options) {
			addOnline(f, o)
			addAsk(f, o)
		},
		run: runRun,
	},
	{
		use: "version", short: "Show the version",
		long: `Show the version.`,
		run:  runVersion,
	},
	{
		use: "completion SHELL", short: "Print completions for bash, zsh, fish or powershell", min: 1, max: 1,
		long: `Print completions for bash, zsh, fish or powershell.`,
		example: `  source <(agent completion bash)
  agent completion fish > ~/.config/fish/completions/agent.fish`,
		run: runCompletion,
	},
}

func addAsk(f *pflag.FlagSet, o *options) {
	f.BoolVar(&o.noBrowser, "no-browser", false, "print the login page's address and wait; open no browser")
	f.DurationVar(&o.timeout, "timeout", 5*time.Minute, "how long to wait for a login")
}

func addPosture(f *pflag.FlagSet, o *options) {
	f.StringVar(&o.postureFile, "posture-file", "", "`FILE` with further facts about this machine, JSON or name: value; login remembers it")
}

func addOnline(f *pflag.FlagSet, o *options) {
	f.StringVar(&o.transport, "transport", "auto", "how to reach the gateway: `auto`, quic or tls")
	addPosture(f, o)
}

const rootLong = `agent connects you to the services of your company, one at a time.

  agent login https://auth.corp.example
  agent connect db.internal:5432

It needs no administrator rights and changes nothing about this machine's network.`

const rootFooter = `
Exit codes: 0 ok, 1 internal error, 2 usage, 3 login needed, 4 denied, 5 approval
pending, 6 the service did not answer, 7 gateway unavailable, 8 captive portal,
9 local conflict, 10 revoked while open.
`

// commands builds the tree from the table.
func (s *shell) commands() *cobra.Command {
	root := &cobra.Command{
		Use: "agent", Long: rootLong, SilenceErrors: true, SilenceUsage: true, Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			return unknownCommand(c, args[0])
		},
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(&cobra.Command{Use: "help [COMMAND]", Short: "Show help", RunE: help})
	root.SetHelpTemplate(helpTemplate)
	root.SetFlagErrorFunc(badFlag)
	f := root.PersistentFlags()
	f.StringVar(&s.o.profile, "profile", "", "`NAME` of the login to use (default \"default\")")
	f.StringVarP(&s.o.output, "output", "o", formatText, "`FORMAT` of results: text, json or jsonl")
	f.BoolVarP(&s.o.verbose, "verbose", "v", false, "say on stderr what the agent does")
	for _, row := range rows {
		root.AddCommand(row.build(s))
	}
	s.root = root
	return root
}

func (row command) build(s *shell) *cobra.Command {
	c := &cobra.Command{
		Use: row.use, Short: row.short, Long: row.long, Example: row.example,
		DisableFlagsInUseLine: true, SilenceErrors: true, SilenceUsage: true,
		Args: func(c *cobra.Command, args []string) error { return row.count(c, args) },
		RunE: func(c *cobra.Command, args []string) error {
			if err := s.o.validate(); err != nil {
				return err
			}
			return row.run(s, c.Context(), args)
		},
	}
	if row.flags != nil {
		row.flags(c.Flags(), &s.o)
	}
	if row.raw {
		c.Flags().SetInterspersed(false)
	}
	return c
}

func (row command) count(c *cobra.Command, args []string) error {
	switch {
	case len(args) < row.min:
		return usage("args", "%s: something is missing", c.Name())
	case row.max >= 0 && len(args) > row.max:
		return usage("args", "%s: %.80q is too much", c.Name(), args[row.max])
	}
	return nil
}

func (o *options) validate() error {
	if !slices.Contains([]string{formatText, formatJSON, formatJSONL}, o.output) {
		return usage("output", "-o %.40q: want text, json or jsonl", o.output)
	}
	if !slices.Contains(append([]string{"", "wireguard"}, agent.Transports...), o.transport) {
		return usage("transport", "--transport %.40q: want auto, quic or tls", o.transport)
	}
	if o.timeout < 0 {
		return usage("timeout", "--timeout %s: want more than 0", o.timeout)
	}
	return nil
}

func help(c *cobra.Command, args []string) error {
	found, rest, err := c.Root().Find(args)
	if err != nil || len(rest) > 0 {
		return unknownCommand(c.Root(), strings.Join(args, " "))
	}
	return found.Help()
}

func unknownCommand(root *cobra.Command, word string) error {
	e := usage("command", "there is no command %.60q", word)
	e.Hint = "agent help"
	root.SuggestionsMinimumDistance = 2
	if near := root.SuggestionsFor(word); len(near) > 0 {
		e.Hint = "did you mean agent " + near[0] + "?"
	}
	return e
}

// badFlag adds the nearest flag to pflag's words.
func badFlag(c *cobra.Command, err error) error {
	e := usage("flag", "%s: %s", c.Name(), err)
	if c.Name() == "ssh" {
		e.Hint = "the host comes first, ssh's own arguments after it"
		return e
	}
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if name := unknown.GetSpecifiedName(); len(name) > 1 && agent.Distance(name, f.Name) <= 2 {
				e.Hint = "did you mean --" + f.Name + "?"
			}
		})
	}
	return e
}

// cutExec takes "--exec CMD…" off the end: what stands there belongs to CMD.
func cutExec(args []string) (ours, command []string) {
	for i, a := range args {
		if a == "--" {
			break
		}
		if first, ok := strings.CutPrefix(a, "--exec="); ok {
			return args[:i], append([]string{first}, args[i+1:]...)
		}
		if a != "--exec" {
			continue
		}
		command = slices.Clone(args[i+1:])
		if len(command) > 1 && command[1] == "--" { // as with Boundary: --exec psql -- -h …
			command = slices.Delete(command, 1, 2)
		}
		if len(command) == 0 {
			return args, nil // pflag says that it needs an argument
		}
		return args[:i], command
	}
	return args, nil
}

const helpTemplate = `{{with (or .Long .Short)}}{{. | trimTrailingWhitespaces}}

{{end}}Usage: {{if .HasParent}}{{.UseLine}}{{if .HasAvailableFlags}} [flags]{{end}}{{else}}agent COMMAND [flags]{{end}}
{{if .HasExample}}
Examples:
{{.Example}}
{{end}}{{if .HasAvailableSubCommands}}
Commands:{{range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name 12}} {{.Short}}{{end}}{{end}}
{{end}}{{if .HasAvailableLocalFlags}}
Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}
{{end}}{{if .HasAvailableInheritedFlags}}
Flags of every command:
{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}
{{end}}{{if not .HasParent}}` + rootFooter + `{{end}}`

func runCompletion(s *shell, _ context.Context, args []string) error {
	switch args[0] {
	case "bash":
		return s.root.GenBashCompletionV2(s.stdout, true)
	case "zsh":
		return s.root.GenZshCompletion(s.stdout)
	case "fish":
		return s.root.GenFishCompletion(s.stdout, true)
	case "powershell":
		return s.root.GenPowerShellCompletionWithDesc(s.stdout)
	}
	return usage("shell", "completion: no completions for %.40q (bash, zsh, fish, powershell)", args[0])
}
