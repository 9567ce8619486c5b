package browse

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"golang.org/x/net/html"
)

// form is an HTML form, as far as one without scripts can be submitted.
type form struct {
	action string
	method string
	fields []field
}

type field struct {
	name, value string
	kind        string // an input's type; "submit" for buttons
	checked     bool
}

// firstForm returns the first form of a document, or nil.
func firstForm(n *html.Node) *form {
	if n.Type == html.ElementNode && n.Data == "form" {
		f := &form{action: attr(n, "action"), method: strings.ToUpper(attr(n, "method"))}
		if f.method != http.MethodPost {
			f.method = http.MethodGet
		}
		f.collect(n)
		return f
	}
	for c := range n.ChildNodes() {
		if f := firstForm(c); f != nil {
			return f
		}
	}
	return nil
}

func (f *form) collect(n *html.Node) {
	for c := range n.ChildNodes() {
		switch {
		case c.Type != html.ElementNode:
		case c.Data == "input":
			kind := strings.ToLower(attr(c, "type"))
			f.fields = append(f.fields, field{attr(c, "name"), attr(c, "value"), kind, has(c, "checked")})
		case c.Data == "button" && strings.ToLower(attr(c, "type")) != "button":
			f.fields = append(f.fields, field{attr(c, "name"), attr(c, "value"), "submit", false})
		case c.Data == "textarea":
			f.fields = append(f.fields, field{attr(c, "name"), text(c), "text", false})
		}
		f.collect(c)
	}
}

// names identifies a form by its fields.
func (f *form) names() string {
	var names []string
	for _, x := range f.fields {
		names = append(names, x.name)
	}
	return strings.Join(names, ",")
}

// fill returns what submitting the form sends. Of several buttons, the one that
// fill names by its name and value is pressed, else the first.
func (f *form) fill(fill map[string]string) (url.Values, error) {
	v := url.Values{}
	for _, x := range f.fields {
		given, ok := fill[x.name]
		switch x.kind {
		case "hidden":
			v.Add(x.name, x.value)
		case "submit", "image", "reset", "button", "file":
		case "checkbox", "radio":
			if x.checked || ok && (given == x.value || x.value == "") {
				v.Add(x.name, x.value)
			}
		default:
			if !ok && x.value == "" {
				return nil, fmt.Errorf("the form asks for %q, and nobody said what to type", x.name)
			}
			if !ok {
				given = x.value
			}
			v.Add(x.name, given)
		}
	}
	if b, ok := f.button(fill); ok && b.name != "" {
		v.Add(b.name, b.value)
	}
	return v, nil
}

func (f *form) button(fill map[string]string) (field, bool) {
	buttons := slices.DeleteFunc(slices.Clone(f.fields), func(x field) bool { return x.kind != "submit" })
	for _, b := range buttons {
		if given, ok := fill[b.name]; ok && given == b.value {
			return b, true
		}
	}
	if len(buttons) == 0 {
		return field{}, false
	}
	return buttons[0], true
}

func attr(n *html.Node, key string) string {
	for _, a := range n.Attr {
		if a.Key == key {
			return a.Val
		}
	}
	return ""
}

func has(n *html.Node, key string) bool {
	return slices.ContainsFunc(n.Attr, func(a html.Attribute) bool { return a.Key == key })
}

// text returns what a person reads below n.
func text(n *html.Node) string {
	switch {
	case n.Type == html.TextNode:
		return n.Data + " "
	case n.Type == html.ElementNode && (n.Data == "script" || n.Data == "style" || n.Data == "title"):
		return ""
	}
	var b strings.Builder
	for c := range n.ChildNodes() {
		b.WriteString(text(c))
	}
	return b.String()
}
