package policy

import (
	"cmp"
	"fmt"
	"maps"
	"regexp/syntax"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/cost"
	celop "cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"go.yaml.in/yaml/v3"
)

// celEnv is the standard library and the variables.
var celEnv = sync.OnceValues(func() (*cel.Env, error) {
	base, err := types.NewRegistry()
	if err != nil {
		return nil, err
	}
	opts := []cel.EnvOption{
		cel.CustomTypeProvider(celProvider{base}),
		cel.Variable("groups", celTexts),
		cel.Variable("now", cel.TimestampType),
		cel.CrossTypeNumericComparisons(true),
		cel.DefaultUTCTimeZone(true),
		cel.EnableIdentifierEscapeSyntax(),
		cel.ParserExpressionSizeLimit(maxCELText),
		cel.ParserErrorRecoveryLimit(4),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals(),
			cel.ValidateComprehensionNestingLimit(maxCELNest)),
	}
	for name := range celObjects {
		opts = append(opts, cel.Variable(name, types.NewObjectType(name)))
	}
	return cel.NewEnv(opts...)
})

// celText reads the text of an expression, which may have several lines.
func (p *parser) celText(n *yaml.Node) (string, bool) {
	s, ok := p.scalar(n, "cel")
	switch {
	case !ok:
		return "", false
	case s.kind != 's':
		p.fail(n, "cel must be text; put quotes around %s", n.Value)
		return "", false
	case strings.ContainsFunc(s.s, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' && r != '\r' }):
		p.fail(n, "cel has a control character")
		return "", false
	case len(s.s) > maxCELText:
		p.fail(n, "an expression of %d bytes; at most %d", len(s.s), maxCELText)
		return "", false
	}
	return s.s, true
}

// expressions are those that were checked already, by text: checking one takes a
// fifth of a millisecond. The zero value has none; it is safe for concurrent use.
type expressions struct{ byText sync.Map }

// expression returns the expression of a text; equal ones are checked once.
func (p *parser) expression(n *yaml.Node, text string) (*expression, bool) {
	if c, ok := p.cels.byText.Load(text); ok {
		return c.(*expression), true
	}
	c, ok := p.check(n, text)
	if ok {
		p.cels.byText.Store(text, c)
	}
	return c, ok
}

// check checks an expression: that it is one, that what it looks at exists, that
// it is true or false and what it costs.
func (p *parser) check(n *yaml.Node, text string) (*expression, bool) {
	env, err := celEnv()
	if err != nil {
		p.fail(n, "cel: %v", err)
		return nil, false
	}
	parsed, issues := env.Parse(text)
	if issues.Err() != nil {
		p.celIssues(n, text, issues)
		return nil, false
	}
	scan := celScan{info: parsed.NativeRep().SourceInfo(), refs: map[celRef]bool{}}
	scan.visit(parsed.NativeRep().Expr())
	for _, f := range scan.faults[:min(len(scan.faults), maxCELFaults)] {
		p.celFail(n, text, f.at, f.message)
	}
	if len(scan.faults) > 0 {
		return nil, false
	}
	checked, issues := env.Check(parsed)
	if issues.Err() != nil {
		p.celIssues(n, text, issues)
		return nil, false
	}
	if t := checked.OutputType(); !t.IsExactType(cel.BoolType) {
		p.fail(n, "cel: the expression must be true or false, this is %s; compare it with something", cel.FormatCELType(t))
		return nil, false
	}
	estimate, err := env.EstimateCost(checked, celSizes{})
	if err != nil || estimate.Max > maxCELCost {
		p.fail(n, "cel: the expression can take %d steps, at most %d are allowed; compare fewer or shorter things", estimate.Max, maxCELCost)
		return nil, false
	}
	c := &expression{text: text, peer: scan.peer, ticks: scan.ticks, coarse: scan.coarse, program: newProgram(env, checked)}
	c.refs = slices.SortedFunc(maps.Keys(scan.refs), func(a, b celRef) int { return cmp.Compare(a.String(), b.String()) })
	return c, true
}

// celSizes are the sizes that the estimate at load takes for possible. What is
// bigger meets the same limit while it runs.
type celSizes struct{}

func (celSizes) EstimateCallCost(_, _ string, _ *cost.AstNode, _ []cost.AstNode) *cost.CallEstimate {
	return nil
}

func (celSizes) EstimateSize(n cost.AstNode) *cost.SizeEstimate {
	if s := n.ComputedSize(); s != nil {
		return s
	}
	text := cost.RangedSizeEstimate(0, 64)
	var s cost.SizeEstimate
	switch n.Type().Kind() {
	case types.ListKind:
		s = cost.ListSizeEstimate(cost.RangedSizeEstimate(0, 100), text)
	case types.MapKind:
		s = cost.MapSizeEstimate(cost.RangedSizeEstimate(0, 50), text, text)
	default:
		s = text
	}
	return &s
}

// regexSize counts the instructions of a compiled regular expression; 0: it is
// none.
func regexSize(pattern string) int {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return 0
	}
	prog, err := syntax.Compile(re.Simplify())
	if err != nil {
		return 0
	}
	return len(prog.Inst)
}

func (p *parser) celIssues(n *yaml.Node, text string, issues *cel.Issues) {
	for _, e := range issues.Errors()[:min(len(issues.Errors()), maxCELFaults)] {
		message := strings.ReplaceAll(e.Message, " (in container '')", "")
		if rest, is := strings.CutPrefix(message, "Syntax error: "); is {
			rest, _, _ = strings.Cut(rest, " expecting {")
			message = "syntax error: " + rest
		}
		p.celFail(n, text, e.Location, message)
	}
}

// celFail notes a fault at a place of an expression, as exactly as YAML's nodes
// tell where that is in the file. In a literal block (|) the column counts from
// the block's indentation, which they do not tell.
func (p *parser) celFail(n *yaml.Node, text string, at common.Location, message string) {
	e := &Error{max(n.Line, 1), max(n.Column, 1), "cel: " + message}
	line, column := max(at.Line(), 1), max(at.Column(), 0)
	quotes := ""
	switch {
	case n.Style&yaml.LiteralStyle != 0:
		e.Line, e.Column = e.Line+line, column+1
		p.errs = append(p.errs, e)
		return
	case n.Style&yaml.FoldedStyle != 0 || strings.Contains(strings.TrimSuffix(text, "\n"), "\n"):
		e.Message += fmt.Sprintf(" (at %d:%d of the expression)", line, column+1)
		p.errs = append(p.errs, e)
		return
	case n.Style&yaml.SingleQuotedStyle != 0:
		quotes = `'`
	case n.Style&yaml.DoubleQuotedStyle != 0:
		quotes = `"\`
	}
	if quotes != "" {
		e.Column++
	}
	for i, r := range []rune(text) {
		if i == column {
			break
		}
		if strings.ContainsRune(quotes, r) { // it is written as two
			e.Column++
		}
	}
	e.Column += column
	p.errs = append(p.errs, e)
}

// celScan goes through an expression before its types are checked: it notes what
// is looked at, and refuses what could not be told or bounded.
type celScan struct {
	info   *ast.SourceInfo
	refs   map[celRef]bool
	peer   bool
	ticks  []celTick
	coarse bool
	depth  int
	faults []celFault
}

type celFault struct {
	at      common.Location
	message string
}

func (s *celScan) fail(e ast.Expr, format string, args ...any) {
	s.faults = append(s.faults, celFault{s.info.GetStartLocation(e.ID()), fmt.Sprintf(format, args...)})
}

func (s *celScan) visit(e ast.Expr) {
	s.depth++
	defer func() { s.depth-- }()
	if s.depth > maxCELDepth {
		if s.depth == maxCELDepth+1 {
			s.fail(e, "more than %d operators within each other", maxCELDepth)
		}
		return
	}
	if r, ok := celRefOf(e); ok {
		s.refer(e, r)
		return
	}
	switch e.Kind() {
	case ast.IdentKind:
		s.ident(e)
	case ast.SelectKind:
		s.visit(e.AsSelect().Operand())
	case ast.CallKind:
		s.call(e)
	case ast.ListKind:
		for _, element := range e.AsList().Elements() {
			s.visit(element)
		}
	case ast.MapKind:
		for _, entry := range e.AsMap().Entries() {
			s.visit(entry.AsMapEntry().Key())
			s.visit(entry.AsMapEntry().Value())
		}
	case ast.StructKind:
		s.fail(e, "objects cannot be made here")
	case ast.ComprehensionKind:
		s.loop(e)
	}
}

func isCELVariable(name string) bool {
	return celObjects[name] != nil || name == "groups" || name == "now"
}

func (s *celScan) loop(e ast.Expr) {
	c := e.AsComprehension()
	for _, name := range []string{c.IterVar(), c.IterVar2()} {
		if isCELVariable(name) {
			s.fail(e, "%q is a variable already; give the loop's another name", name)
		}
	}
	for _, part := range []ast.Expr{c.IterRange(), c.AccuInit(), c.LoopCondition(), c.LoopStep(), c.Result()} {
		s.visit(part)
	}
}

func (s *celScan) ident(e ast.Expr) {
	switch name := e.AsIdent(); {
	case strings.HasPrefix(name, "."):
		s.fail(e, "a name starts with a letter; write %s", name[1:])
	case celObjects[name] != nil:
		s.fail(e, "%s is no value by itself; write %[1]s.FIELD (%s)", name, fieldsOf(name))
	case name == "groups":
		s.refs[celRef{object: name}] = true
	case name == "now":
		s.coarse = true
	}
}

func fieldsOf(object string) string {
	return strings.Join(slices.Sorted(maps.Keys(celObjects[object])), ", ")
}

// celRefOf reads OBJECT.FIELD, or an entry of one of the maps by a literal key.
func celRefOf(e ast.Expr) (celRef, bool) {
	var of ast.Expr
	var name string
	switch e.Kind() {
	case ast.SelectKind:
		of, name = e.AsSelect().Operand(), e.AsSelect().FieldName()
	case ast.CallKind:
		c := e.AsCall()
		if c.FunctionName() != celop.Index {
			return celRef{}, false
		}
		text, ok := literalText(c.Args()[1])
		if !ok {
			return celRef{}, false
		}
		of, name = c.Args()[0], text
	default:
		return celRef{}, false
	}
	if e.Kind() == ast.SelectKind && of.Kind() == ast.IdentKind && celObjects[of.AsIdent()] != nil {
		return celRef{object: of.AsIdent(), field: name}, true
	}
	if r, ok := celRefOf(of); ok && r.key == "" && (r.field == "claims" || r.field == "facts") {
		r.key = name
		return r, true
	}
	return celRef{}, false
}

func literalText(e ast.Expr) (string, bool) {
	if e.Kind() != ast.LiteralKind {
		return "", false
	}
	s, ok := e.AsLiteral().(types.String)
	return string(s), ok
}

func (s *celScan) refer(e ast.Expr, r celRef) {
	if _, known := celObjects[r.object][r.field]; !known {
		s.fail(e, "%s has no field %q (%s)%s", r.object, r.field, fieldsOf(r.object),
			suggest(r.field, slices.Collect(maps.Keys(celObjects[r.object]))))
		return
	}
	switch {
	case r.field == "facts" && r.key == "":
		s.fail(e, "device.facts is no value by itself; write device.facts.NAME")
	case r.field == "facts":
		s.fact(e, r.key)
	case r.field == "age" || r.field == "expires_in":
		s.coarse = true
	case r.field == "ip":
		s.peer = true
	}
	if r.object != "request" {
		s.refs[r] = true
	}
}

func (s *celScan) fact(e ast.Expr, name string) {
	if knownFacts[name].kind != 0 {
		return
	}
	hint := suggest(name, slices.Collect(maps.Keys(knownFacts)))
	if !factName.MatchString(name) || hint != "" {
		s.fail(e, "unknown fact %q%s", name, hint)
	}
}

func (s *celScan) call(e ast.Expr) {
	c := e.AsCall()
	args := c.Args()
	switch name := c.FunctionName(); {
	case name == celop.In && args[1].Kind() == ast.IdentKind && args[1].AsIdent() == "groups":
		if group, ok := literalText(args[0]); ok {
			s.refs[celRef{object: "groups", field: group}] = true
			return
		}
	case celOrders[name]:
		if s.tick(args[0], args[1]) || s.tick(args[1], args[0]) {
			return
		}
		s.ordered(name, args)
	case name == overloads.Matches && len(args) > 0:
		s.pattern(args[len(args)-1])
	case c.IsMemberFunction() && strings.HasPrefix(name, "get") && len(args) > 0:
		s.fail(e, "%s() takes no time zone here, it is UTC; use time_of_day or day_of_week with timezone", name)
	}
	if c.IsMemberFunction() {
		s.visit(c.Target())
	}
	for _, arg := range args {
		s.visit(arg)
	}
}

// pattern checks what matches() looks for: anything but a literal could be any
// expression, compiled anew for each question.
func (s *celScan) pattern(e ast.Expr) {
	text, ok := literalText(e)
	size := regexSize(text)
	switch {
	case !ok:
		s.fail(e, "the pattern of matches() must be a literal text")
	case size == 0:
		s.fail(e, "%q is no regular expression (RE2)", text)
	case size > maxCELRegex:
		s.fail(e, "a regular expression of %d instructions; at most %d", size, maxCELRegex)
	}
}

var celOrders = map[string]bool{
	celop.Less: true, celop.LessEquals: true, celop.Greater: true, celop.GreaterEquals: true,
	celop.Equals: true, celop.NotEquals: true,
}

// ordered refuses to order versions as texts, of which "15.10" < "15.4".
func (s *celScan) ordered(op string, args []ast.Expr) {
	if op == celop.Equals || op == celop.NotEquals {
		return
	}
	for _, arg := range args {
		if r, ok := celRefOf(arg); ok && r.field == "facts" && knownFacts[r.key].order != nil {
			s.fail(arg, `CEL would compare %s as text ("15.10" < "15.4"); write device: {%[1]s: {">=": "15.4"}}`, r.key)
		}
	}
}

// tick notes the comparison of a clock with a constant; false: it is none.
func (s *celScan) tick(clock, constant ast.Expr) bool {
	if constant.Kind() != ast.CallKind || len(constant.AsCall().Args()) != 1 {
		return false
	}
	from := constant.AsCall().FunctionName()
	text, ok := literalText(constant.AsCall().Args()[0])
	if !ok {
		return false
	}
	r, isRef := celRefOf(clock)
	switch {
	case clock.Kind() == ast.IdentKind && clock.AsIdent() == "now" && from == overloads.TypeConvertTimestamp:
		at, err := time.Parse(time.RFC3339, text)
		s.ticks = append(s.ticks, celTick{of: "now", at: at})
		return err == nil
	case isRef && r.object == "session" && (r.field == "age" || r.field == "expires_in") && from == overloads.TypeConvertDuration:
		d, err := time.ParseDuration(text)
		s.ticks = append(s.ticks, celTick{of: r.field, d: d})
		s.refs[r] = true
		return err == nil
	}
	return false
}
