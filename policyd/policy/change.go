package policy

import (
	"maps"
	"slices"
	"strings"

	"sallyport"
)

// change is one way in which an atom could be otherwise.
type change struct {
	by criterion // whose matcher asks for it, and what it is to be for it
	to Value
	// of a fact
	value  any
	source string
	// of a login: how, and how that differs from the present one
	login         bool
	methods       []string
	with, without []string
}

// same reports whether c and o change the same to the same.
func (c *change) same(o change) bool {
	return c.value == o.value && c.source == o.source && slices.Equal(c.methods, o.methods)
}

// proposals are the changes that make c what is wanted.
func (h *search) proposals(c criterion, want Value) []change {
	var out []change
	switch c := c.(type) {
	case *fact:
		source := c.counted(h.in)[0]
		for _, v := range c.match.values() {
			if c.match.value(v) == want {
				out = append(out, change{by: c, to: want, value: v, source: source})
			}
		}
	case *deviceField:
		if c.match.value(true) == want {
			out = append(out, change{by: c, to: want})
		}
	case *sessionAge:
		if c.of(0) == want {
			out = append(out, change{by: c, to: want, login: true, methods: h.in.Person.authMethods()})
		}
	}
	return out
}

// maxMethods is how many methods, of those that a route asks for, are combined.
const maxMethods = 4

// anotherMethod stands for a method that no policy names.
const anotherMethod = "another method"

// logins adds to the atom of a new login those by other methods: each combination
// of the methods that the formula names, with the person's others and without;
// the nearest to the present ones come first.
func (h *search) logins() {
	i := slices.IndexFunc(h.atoms, func(a atom) bool { return a.about == aboutLogin })
	if i < 0 {
		return
	}
	var names []string
	var by criterion
	h.allow.each(func(f *formula) {
		if c, is := f.is.(*authMethod); is {
			by = c
			for _, t := range c.tests {
				if name := t.of[0].s; len(names) < maxMethods && !slices.Contains(names, name) {
					names = append(names, name)
				}
			}
		}
	})
	if by == nil {
		return
	}
	now := h.in.Person.authMethods()
	others := slices.DeleteFunc(slices.Clone(now), func(m string) bool { return slices.Contains(names, m) })
	var logins []change
	for set := range 1 << len(names) {
		var methods []string
		for j, name := range names {
			if set&(1<<j) != 0 {
				methods = append(methods, name)
			}
		}
		logins = append(logins, loginBy(by, now, methods), loginBy(by, now, append(slices.Clone(others), methods...)))
	}
	slices.SortStableFunc(logins, func(a, b change) int { return a.distance() - b.distance() })
	for _, c := range logins {
		if c.distance() > 0 {
			h.atoms[i].add(c)
		}
	}
}

func loginBy(by criterion, now, methods []string) change {
	if len(methods) == 0 { // of which nothing would be known
		methods = []string{anotherMethod}
	}
	return change{by: by, login: true, methods: methods, with: minus(methods, now), without: minus(now, methods)}
}

// minus returns what is in a and not in b.
func minus(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}

func (c *change) isPlainLogin() bool { return c.login && c.distance() == 0 }

func (c *change) distance() int { return len(c.with) + len(c.without) }

// makes is what criterion of, which looks at the same atom, would be.
func (c *change) makes(of criterion, in *Input) Value {
	switch of := of.(type) {
	case *fact:
		if !slices.Contains(of.counted(in), c.source) {
			return Unknown
		}
		return of.match.value(c.value)
	case *deviceField:
		return of.match.value(true)
	case *sessionAge:
		return of.of(0)
	case *authMethod:
		return of.of(c.methods)
	}
	return Unknown
}

// make makes the change in a copy of a question and its person.
func (c *change) make(in *Input, p *Person) {
	switch by := c.by.(type) {
	case *fact:
		posture := sallyport.Posture{Received: in.Now, Sequence: in.Now.UnixMilli(), Facts: map[string]sallyport.Fact{}}
		if old := p.Posture; old != nil {
			maps.Copy(posture.Facts, old.Facts)
			for name, f := range posture.Facts {
				f.At = in.Now.Add(-FactAge(old, f, in.Now))
				posture.Facts[name] = f
			}
		}
		posture.Facts[by.name] = sallyport.Fact{Value: c.value, At: in.Now, Source: c.source}
		p.Posture = &posture
	case *deviceField:
		device := *p.Device
		device.Approved = true
		p.Device = &device
	default:
		login, session := sallyport.Login{}, *p.Session
		if p.Login != nil {
			login = *p.Login
		}
		login.Authenticated, login.AuthMethods, session.AuthMethods = in.Now, c.methods, c.methods
		p.Login, p.Session = &login, &session
	}
}

// remedy is the change in words.
func (c *change) remedy(in *Input) sallyport.Remedy {
	out := sallyport.Remedy{Condition: c.by.path()}
	switch by := c.by.(type) {
	case *fact:
		out.Want, out.Hint = by.wantOf(c, in), by.hint(c, in)
	case *deviceField:
		out.Want, out.Hint = "true", "ask an administrator to approve this device"
	case *sessionAge:
		out.Want, out.Hint = by.wanted(true), "log in again"+how(in)
		if c.to == False {
			out.Want = opposite(out.Want)
		}
	case *authMethod:
		out.Want, out.Hint = c.methodWords(), c.methodHint()+how(in)
	}
	return out
}

func (c *change) methodWords() string {
	var out []string
	for _, m := range c.with {
		out = append(out, "has "+m)
	}
	for _, m := range c.without {
		out = append(out, "excludes "+m)
	}
	return strings.Join(out, " and ")
}

func (c *change) methodHint() string {
	hint := "log in again"
	if len(c.with) > 0 {
		hint += " with " + strings.Join(c.with, " and ")
	}
	if len(c.without) > 0 {
		hint += " without " + strings.Join(c.without, " and ")
	}
	return hint
}

// wantOf is what the fact must become, in words.
func (f *fact) wantOf(c *change, in *Input) string {
	words := wantWords(&f.match)
	if c.to == False {
		words = "not " + words
		if b, ok := c.value.(bool); ok {
			words = valueWords(b)
		}
	}
	if c.source != in.site.Sources[0] {
		words += " (" + c.source + ")"
	}
	return words
}

// hint tells how to change the fact; when it already has the value, it is the
// report that is missing.
func (f *fact) hint(c *change, in *Input) string {
	if p := in.Person.Posture; p != nil {
		if now, ok := p.Facts[f.name]; ok && now.Value == c.value && now.Source == c.source {
			return "report it again: agent posture"
		}
	}
	if b, ok := c.value.(bool); ok && !b {
		return ""
	}
	return knownFacts[f.name].hint
}

// counted are the sources whose facts count for f.
func (f *fact) counted(in *Input) []string {
	if f.sources != nil {
		return f.sources
	}
	return in.site.Sources
}

// how is the command that logs in again and keeps connections; browsers have none.
func how(in *Input) string {
	if in.Person.Session.Kind == sallyport.BrowserSession {
		return ""
	}
	return ": agent extend"
}
