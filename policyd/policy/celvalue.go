package policy

import (
	"errors"
	"reflect"
	"strings"
	"time"

	"sallyport"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// celField is a field of one of the objects that expressions look at.
type celField struct {
	is *cel.Type
	// get returns a ref.Val, or nil if it is not there.
	get func(*Input) ref.Val
}

var (
	celAnything = cel.MapType(cel.StringType, cel.DynType)
	celTexts    = cel.ListType(cel.StringType)
	celHeaders  = cel.MapType(cel.StringType, celTexts)
)

// celObjects are the variables with fields. request is what stands in every audit
// record; the others are about the person.
var celObjects = map[string]map[string]celField{
	"user": {
		"id":     {cel.StringType, func(in *Input) ref.Val { return celText(string(in.Person.User.ID)) }},
		"email":  {cel.StringType, func(in *Input) ref.Val { return celText(in.Person.Email) }},
		"domain": {cel.StringType, func(in *Input) ref.Val { return celText(domainOf(in.Person)) }},
		"name":   {cel.StringType, func(in *Input) ref.Val { return celText(in.Person.User.Name) }},
		"claims": {celAnything, func(in *Input) ref.Val { return celMap(in.Person.User.Claims) }},
	},
	"session": {
		"id":           {cel.StringType, func(in *Input) ref.Val { return celText(string(in.Person.Session.ID)) }},
		"kind":         {cel.StringType, func(in *Input) ref.Val { return celText(string(in.Person.Session.Kind)) }},
		"claims":       {celAnything, func(in *Input) ref.Val { return celMap(in.Person.Session.Claims) }},
		"auth_methods": {celTexts, func(in *Input) ref.Val { return celList(in.Person.Session.AuthMethods) }},
		"age":          {cel.DurationType, celSessionAge},
		"expires_in":   {cel.DurationType, celExpiresIn},
	},
	"device": {
		"id":       {cel.StringType, func(in *Input) ref.Val { return celText(string(in.Person.Device.ID)) }},
		"approved": {cel.BoolType, func(in *Input) ref.Val { return types.Bool(in.Person.Device.Approved) }},
		"type":     {cel.StringType, func(in *Input) ref.Val { return celText(in.Person.Device.Type) }},
		"facts":    {celAnything, func(in *Input) ref.Val { return (*celFacts)(in) }},
	},
	"request": {
		"method":       {cel.StringType, func(in *Input) ref.Val { return celText(in.Request.Method) }},
		"path":         {cel.StringType, celPath},
		"headers":      {celHeaders, celHeadersOf},
		"network":      {cel.StringType, func(in *Input) ref.Val { return celText(string(in.Request.Target.Network)) }},
		"host":         {cel.StringType, func(in *Input) ref.Val { return celText(in.Request.Target.Host) }},
		"port":         {cel.IntType, func(in *Input) ref.Val { return types.Int(in.Request.Target.Port) }},
		"ip":           {cel.StringType, celPeer},
		"ssh_username": {cel.StringType, celSSHUsername},
		"mcp_method":   {cel.StringType, celMCPMethod},
		"mcp_tool":     {cel.StringType, celMCPTool},
	},
}

func celText(s string) ref.Val {
	if s == "" {
		return nil
	}
	return types.String(s)
}

// celList takes an empty list for one that is not known.
func celList(l []string) ref.Val {
	if len(l) == 0 {
		return nil
	}
	return types.NewStringList(types.DefaultTypeAdapter, l)
}

func celSessionAge(in *Input) ref.Val {
	if in.Person.Login == nil {
		return nil
	}
	at := in.Person.Login.Authenticated
	if at.IsZero() {
		at = in.Person.Login.Created
	}
	if at.IsZero() {
		return nil
	}
	return types.Duration{Duration: max(in.Now.Sub(at), 0)}
}

func celExpiresIn(in *Input) ref.Val {
	if in.Person.ExpiresIn == 0 {
		return nil
	}
	return types.Duration{Duration: in.Person.ExpiresIn}
}

// celPath leaves the query out, as the audit log does.
func celPath(in *Input) ref.Val {
	path, _, _ := strings.Cut(in.Request.Path, "?")
	return celText(path)
}

func celHeadersOf(in *Input) ref.Val {
	if in.Request.Headers == nil {
		return nil
	}
	return types.DefaultTypeAdapter.NativeToValue(in.Request.Headers)
}

func celPeer(in *Input) ref.Val {
	if !in.Request.Peer.IsValid() {
		return nil
	}
	return types.String(in.Request.Peer.Addr().Unmap().String())
}

func celSSHUsername(in *Input) ref.Val {
	if in.Request.SSH == nil {
		return nil
	}
	return celText(in.Request.SSH.Username)
}

func celMCPMethod(in *Input) ref.Val {
	if in.Request.MCP == nil {
		return nil
	}
	return celText(in.Request.MCP.Method)
}

func celMCPTool(in *Input) ref.Val {
	if in.Request.MCP == nil {
		return nil
	}
	return celText(in.Request.MCP.Tool)
}

// celInput is an Input to CEL: the variables by name. Nothing is built before it
// is asked for.
type celInput Input

// ResolveName implements cel.Activation. The objects are the *Input itself; the
// checks at load see to it that only their fields are asked for.
func (a *celInput) ResolveName(name string) (any, bool) {
	in := (*Input)(a)
	switch name {
	case "now":
		return types.Timestamp{Time: in.Now.UTC()}, true
	case "groups":
		return celGroupsOf(in), true
	case "device":
		if in.celLacksDevice() {
			return types.WrapErr(celNoDevice), true
		}
		return in, true
	case "user", "session", "request":
		return in, true
	}
	return nil, false
}

// Parent implements cel.Activation.
func (a *celInput) Parent() cel.Activation { return nil }

// celMissing says what is not there, in words that may be told.
type celMissing string

func (e celMissing) Error() string { return string(e) }

const (
	celNoDevice celMissing = "this session has no device"
	celNoGroups celMissing = "the directory does not know you"
	celNoFacts  celMissing = "facts stand by name"
)

func (in *Input) celLacksDevice() bool {
	if in.recall != nil {
		none, was := in.recall["device"]
		return was && none == nil
	}
	return in.Person.Device == nil
}

// celProvider adds the objects' types to CEL's own.
type celProvider struct{ types.Provider }

func (p celProvider) FindStructType(name string) (*types.Type, bool) {
	if _, ours := celObjects[name]; ours {
		return types.NewTypeTypeWithParam(types.NewObjectType(name)), true
	}
	return p.Provider.FindStructType(name)
}

func (p celProvider) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	object, ours := celObjects[name]
	if !ours {
		return p.Provider.FindStructFieldType(name, field)
	}
	f, ok := object[field]
	if !ok {
		return nil, false
	}
	path := celRef{object: name, field: field}
	missing := errors.New("no such key: " + field)
	return &types.FieldType{
		Type:  f.is,
		IsSet: func(in any) bool { return f.value(in, path) != nil },
		GetFrom: func(in any) (any, error) {
			if v := f.value(in, path); v != nil {
				return v, nil
			}
			return nil, missing
		},
	}, true
}

func (f celField) value(from any, at celRef) ref.Val {
	in, ok := from.(*Input)
	switch {
	case !ok:
		return nil
	case in.recall != nil && at.object != "request":
		return in.recallField(at, f.is)
	}
	return f.get(in)
}

// celMap is a map of JSON values; a null is as if it were not there.
type celMap map[string]any

func (m celMap) Find(key ref.Val) (ref.Val, bool) {
	name, isText := key.(types.String)
	if !isText {
		return types.MaybeNoSuchOverloadErr(key), false
	}
	v := m[string(name)]
	if v == nil {
		return nil, false
	}
	return types.DefaultTypeAdapter.NativeToValue(v), true
}

// whole is for what is rarely asked for: all its keys.
func (m celMap) whole() traits.Mapper {
	known := make(map[string]any, len(m))
	for k, v := range m {
		if v != nil {
			known[k] = v
		}
	}
	return types.NewStringInterfaceMap(types.DefaultTypeAdapter, known)
}

func (m celMap) ConvertToNative(t reflect.Type) (any, error) { return m.whole().ConvertToNative(t) }
func (m celMap) ConvertToType(t ref.Type) ref.Val            { return m.whole().ConvertToType(t) }
func (m celMap) Equal(o ref.Val) ref.Val                     { return m.whole().Equal(o) }
func (m celMap) Type() ref.Type                              { return types.MapType }
func (m celMap) Value() any                                  { return map[string]any(m) }
func (m celMap) Contains(k ref.Val) ref.Val                  { return m.whole().Contains(k) }
func (m celMap) Get(k ref.Val) ref.Val                       { return m.whole().Get(k) }
func (m celMap) Iterator() traits.Iterator                   { return m.whole().Iterator() }
func (m celMap) Size() ref.Val                               { return m.whole().Size() }

// celFacts are the facts that count. One that does not is an error, also to
// has(): a device that tells nothing must not pass "!has(device.facts.malware)".
type celFacts Input

func (f *celFacts) Get(key ref.Val) ref.Val {
	name, isText := key.(types.String)
	if !isText {
		return types.MaybeNoSuchOverloadErr(key)
	}
	v, left, why := (*Input)(f).celFact(string(name))
	if v == nil {
		return types.WrapErr(celMissing(string(name) + ": " + why))
	}
	if left != 0 {
		(*Input)(f).lasts(left)
	}
	return types.DefaultTypeAdapter.NativeToValue(v)
}

// celFact returns a fact that counts, and for how long it does (0: for ever); or
// nil, and why it does not.
func (in *Input) celFact(name string) (v any, left time.Duration, why string) {
	if in.recall != nil {
		return in.recall[celRef{"device", "facts", name}.String()], 0, "not recorded"
	}
	got, left, why := (&fact{name: name}).lookup(in)
	if left <= 0 {
		return nil, 0, strings.TrimSuffix(strings.TrimPrefix(why, "unknown ("), ")")
	}
	return got.Value, left, ""
}

func (f *celFacts) IsSet(key ref.Val) ref.Val {
	if v := f.Get(key); types.IsError(v) {
		return v
	}
	return types.True
}

func (f *celFacts) ConvertToNative(reflect.Type) (any, error) { return nil, celNoFacts }
func (f *celFacts) ConvertToType(ref.Type) ref.Val            { return types.WrapErr(celNoFacts) }
func (f *celFacts) Equal(ref.Val) ref.Val                     { return types.WrapErr(celNoFacts) }
func (f *celFacts) Type() ref.Type                            { return types.MapType }
func (f *celFacts) Value() any                                { return f }

// celGroups are ids and names of groups, sorted: they are found by bisection.
type celGroups Groups

func celGroupsOf(in *Input) ref.Val {
	g := &in.Person.Groups
	if in.recall != nil {
		g = recallGroups(in.recall)
	}
	if !g.known() {
		return types.WrapErr(celNoGroups)
	}
	return (*celGroups)(g)
}

func (g *celGroups) Contains(v ref.Val) ref.Val {
	name, isText := v.(types.String)
	if !isText {
		return types.MaybeNoSuchOverloadErr(v)
	}
	return types.Bool((*Groups)(g).has(string(name)))
}

func (g *celGroups) whole() traits.Lister {
	return types.NewStringList(types.DefaultTypeAdapter, g.names)
}

func (g *celGroups) ConvertToNative(t reflect.Type) (any, error) { return g.whole().ConvertToNative(t) }

func (g *celGroups) ConvertToType(t ref.Type) ref.Val { return g.whole().ConvertToType(t) }
func (g *celGroups) Equal(o ref.Val) ref.Val          { return g.whole().Equal(o) }
func (g *celGroups) Type() ref.Type                   { return types.ListType }
func (g *celGroups) Value() any                       { return g.names }
func (g *celGroups) Add(o ref.Val) ref.Val            { return g.whole().Add(o) }
func (g *celGroups) Get(i ref.Val) ref.Val            { return g.whole().Get(i) }
func (g *celGroups) Iterator() traits.Iterator        { return g.whole().Iterator() }
func (g *celGroups) Size() ref.Val                    { return types.Int(len(g.names)) }

// celRef is something that an expression refers to: "user.email",
// "user.claims.dept", "groups.dba" (whether one is a member), "groups".
type celRef struct{ object, field, key string }

func (r celRef) String() string {
	s := r.object
	if r.field != "" {
		s += "." + r.field
	}
	if r.key != "" {
		s += "." + r.key
	}
	return s
}

// parent is the map that r is an entry of; zero: of none.
func (r celRef) parent() celRef {
	switch {
	case r.key != "":
		return celRef{object: r.object, field: r.field}
	case r.object == "groups" && r.field != "":
		return celRef{object: "groups"}
	}
	return celRef{}
}

// record returns what r refers to, as JSON takes it; nil: it is not there.
func (r celRef) record(in *Input) any {
	switch {
	case r.object == "device" && in.Person.Device == nil:
		return nil
	case r.object == "groups" && !in.Person.Groups.known():
		return nil
	case r.object == "groups" && r.field != "":
		return in.Person.Groups.has(r.field)
	case r.object == "groups":
		return in.Person.Groups.names
	case r.object == "device" && r.key != "":
		v, _, _ := in.celFact(r.key)
		return v
	}
	v := celObjects[r.object][r.field].get(in)
	switch v := v.(type) {
	case nil:
		return nil
	case types.Duration:
		return v.String()
	case celMap:
		if r.key != "" {
			return v[r.key]
		}
	}
	return v.Value()
}

// recallValues makes expressions see what from recorded of the person, instead
// of in.Person: only what they refer to is known then.
func (in *Input) recallValues(from *Inputs) {
	if in.recall = from.Values; in.recall == nil {
		in.recall = map[string]any{}
	}
}

// recallField returns a field as it was recorded.
func (in *Input) recallField(at celRef, is *cel.Type) ref.Val {
	v := in.recall[at.String()]
	switch {
	case at.field == "facts":
		return (*celFacts)(in)
	case at.field == "claims":
		return recallClaims(in.recall, at)
	case v == nil:
		return nil
	case is == cel.DurationType:
		s, _ := v.(string)
		d, err := time.ParseDuration(s)
		if err != nil {
			return nil
		}
		return types.Duration{Duration: d}
	}
	return types.DefaultTypeAdapter.NativeToValue(v)
}

// recallClaims returns the recorded claims: all of them, or those that were
// referred to.
func recallClaims(values map[string]any, at celRef) celMap {
	if all, ok := values[at.String()].(map[string]any); ok {
		return all
	}
	some := celMap{}
	for path, v := range values {
		if name, ok := strings.CutPrefix(path, at.String()+"."); ok {
			some[name] = v
		}
	}
	return some
}

// recallGroups returns the recorded groups: all of them, or those that were asked
// for.
func recallGroups(values map[string]any) *Groups {
	var known []sallyport.Group
	all, whole := values["groups"]
	switch all := all.(type) {
	case []any:
		for _, g := range all {
			name, _ := g.(string)
			known = append(known, sallyport.Group{ID: name})
		}
	case []string:
		for _, name := range all {
			known = append(known, sallyport.Group{ID: name})
		}
	case nil:
		if whole {
			return &Groups{}
		}
	}
	for path, v := range values {
		name, ok := strings.CutPrefix(path, "groups.")
		is, told := v.(bool)
		switch {
		case ok && !told:
			return &Groups{}
		case ok && is:
			known = append(known, sallyport.Group{ID: name})
		}
	}
	g := NewGroups(known)
	return &g
}
