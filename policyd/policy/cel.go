package policy

import (
	"errors"
	"regexp"
	"strings"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"
	"go.yaml.in/yaml/v3"
)

const (
	maxCELText = 4 << 10 // bytes of an expression
	// maxCELCost bounds an evaluation in CEL's own units, before and while it
	// runs; the dearest units take 100 ns each.
	maxCELCost   = 2_000
	maxCELNest   = 2   // loops within loops
	maxCELDepth  = 32  // operators within each other: types of literals grow with it
	maxCELRegex  = 100 // instructions of a compiled regular expression
	maxCELFaults = 8   // that are told of one expression
	// maxCELMatch bounds instructions times bytes of text, which is what RE2's
	// algorithm takes: some 100 µs.
	maxCELMatch = 1 << 15
	// celExactness is how exact time is in expressions that do more with it than
	// compare it with a constant.
	celExactness = 10 * time.Second
)

// expression is cel: a condition in the Common Expression Language
// (https://cel.dev) over user, session, device, groups, request and now. It is no
// atom of remedies: nothing tells which facts would make it true.
//
// Texts compare exactly, also e-mail addresses; the criteria email and domain do not
// mind the case.
//
// An error while it runs (no such key, no such overload, a division by zero, a
// cost above maxCELCost) is unknown, as is a device or directory entry that is
// not there, unless the operators of CEL settle the answer without it. Without a
// live session an expression that refers to the person is unknown as a whole.
type expression struct {
	text    string
	refs    []celRef // to the person; sorted
	peer    bool     // it refers to request.ip
	ticks   []celTick
	coarse  bool // it does more with time than ticks
	program func() (cel.Program, error)
}

func parseCEL(p *parser, _ string, n *yaml.Node) (condition, bool) {
	text, ok := p.celText(n)
	if !ok {
		return condition{}, false
	}
	c, ok := p.expression(n, text)
	return leafOf(c), ok
}

// newProgram makes the program at the first evaluation: most routes of a big
// site are not asked for between two reloads.
func newProgram(env *cel.Env, checked *cel.Ast) func() (cel.Program, error) {
	return sync.OnceValues(func() (cel.Program, error) {
		return env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostTracking(celCosts{}), cel.CostLimit(maxCELCost),
			cel.OptimizeRegex(boundedMatch(overloads.Matches), boundedMatch(overloads.MatchesString)))
	})
}

// celCosts charges what CEL's own tables misjudge: a membership of groups is
// found by bisection; calls on values whose types are known only while the
// expression runs would be one unit, however long two texts are that they join.
type celCosts struct{}

func (celCosts) CallCost(_, overload string, args []ref.Val, result ref.Val) *uint64 {
	if overload == overloads.InList {
		if _, is := args[1].(*celGroups); is {
			return new(uint64)
		}
	}
	if overload != "" {
		return nil // CEL's own
	}
	size := cost.ActualSize(result)
	for _, arg := range args {
		size = cost.SafeAdd(size, cost.ActualSize(arg))
	}
	units := cost.SafeAdd(1, cost.SafeMultiplyByFactor(size, cost.StringTraversalCostFactor))
	return &units
}

const celTooLong celMissing = "a text is too long to be matched"

// boundedMatch makes matches() refuse texts that would take too long.
func boundedMatch(overload string) *interpreter.RegexOptimization {
	return &interpreter.RegexOptimization{
		Function: overloads.Matches, OverloadID: overload, RegexIndex: 1,
		Factory: func(call interpreter.InterpretableCall, pattern string) (interpreter.InterpretableCall, error) {
			re, err := regexp.Compile(pattern)
			if err != nil {
				return nil, err
			}
			longest := maxCELMatch / max(regexSize(pattern), 1)
			match := func(args ...ref.Val) ref.Val {
				text, ok := args[0].(types.String)
				switch {
				case !ok:
					return types.MaybeNoSuchOverloadErr(args[0])
				case len(text) > longest:
					return types.WrapErr(celTooLong)
				}
				return types.Bool(re.MatchString(string(text)))
			}
			return interpreter.NewCall(call.ID(), call.Function(), call.OverloadID(), call.Args(), match), nil
		},
	}
}

func (c *expression) eval(in *Input) Value {
	v, _ := c.run(in)
	return v
}

const celNoSession celMissing = "no live session"

// run returns the value and, if that is unknown, why.
func (c *expression) run(in *Input) (Value, error) {
	if in.Person == nil && len(c.refs) > 0 {
		return Unknown, celNoSession
	}
	in.peer = in.peer || c.peer
	for i := range c.ticks {
		c.ticks[i].note(in)
	}
	if c.coarse {
		in.lasts(celExactness)
	}
	p, err := c.program()
	if err != nil {
		return Unknown, err
	}
	out, _, err := p.Eval((*celInput)(in))
	if err != nil {
		return Unknown, err
	}
	b, ok := out.(types.Bool)
	if !ok {
		return Unknown, errors.New("no such overload")
	}
	return truth(bool(b)), nil
}

// celTick is a comparison of the time with a constant: when its outcome changes
// is known exactly.
type celTick struct {
	of string        // now, session.age or session.expires_in
	at time.Time     // of now
	d  time.Duration // of the others
}

// note tells in when the comparison's outcome could change.
func (t *celTick) note(in *Input) {
	left := t.at.Sub(in.Now)
	if t.of != "now" {
		d, ok := celObjects["session"][t.of].get(in).(types.Duration)
		if !ok {
			return
		}
		left = t.d - d.Duration
		if t.of == "expires_in" {
			left = -left
		}
	}
	switch {
	case left > 0:
		in.lasts(left)
	case left == 0: // "<=" holds for this moment only
		in.lasts(time.Nanosecond)
	}
}

func (c *expression) path() string { return "cel" }

func (c *expression) wanted(open bool) string {
	const most = 200
	if !open { // it may name groups and people
		return "the expression of this rule holds"
	}
	s := strings.Join(strings.Fields(c.text), " ")
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

func (c *expression) found(in *Input) (string, time.Duration) {
	v, err := c.run(in)
	if err != nil {
		return "unknown (" + celReason(err) + ")", 0
	}
	return v.String(), 0
}

// celReason says what went wrong without the values at which it did: an
// expression can hold names of other people.
func celReason(err error) string {
	var missing celMissing
	if errors.As(err, &missing) {
		return string(missing)
	}
	text := err.Error()
	switch {
	case strings.HasPrefix(text, "no such key: "):
		return valueWords(text)
	case strings.HasPrefix(text, "no such overload"):
		return "a value is of another type than this rule expects"
	case strings.HasPrefix(text, "division by zero"), strings.HasPrefix(text, "modulus by zero"):
		return "division by zero"
	case strings.Contains(text, "cost limit"):
		return "it takes too long"
	}
	return "it has no value for you"
}

func (c *expression) note(in *Input, to *Inputs) {
	if in.Person == nil || len(c.refs) == 0 {
		return
	}
	if to.Values == nil {
		to.Values = make(map[string]any)
	}
	for _, r := range c.refs {
		to.Values[r.String()] = r.record(in)
		if r.object == "device" && in.Person.Device == nil {
			to.Values["device"] = nil
		}
	}
}

func (c *expression) recalled(from *Inputs) bool {
	for _, r := range c.refs {
		_, itself := from.Values[r.String()]
		_, whole := from.Values[r.parent().String()]
		if !itself && !whole {
			return false
		}
	}
	return true
}
