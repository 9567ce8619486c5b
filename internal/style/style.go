// Package style checks the house itself: which package may import which, who
// owns a third-party module, and a few rules that reviewers should not have to
// repeat. It reads source text only, so it is quick and needs no build. The
// rules are in rules.go; the test over the tree is this package's reason to be.
package style

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Rules is what Check holds a tree to.
type Rules struct {
	Module    string // path of the tree's module
	Layers    []Layer
	Owners    []Owner
	Forbidden []string
	// Fields is the file in the tree whose table lists the names of log fields;
	// empty, or a file that is not there: any name will do.
	Fields string
}

// House returns the rules of this project.
func House() Rules {
	return Rules{Module: "sallyport", Layers: layers, Owners: owners, Forbidden: forbidden, Fields: "docs/logging.md"}
}

// Check returns what is wrong in the tree, a line each, "file:line: what". It
// leaves out testdata, hidden directories and modules of their own.
func Check(tree fs.FS, rules Rules) ([]string, error) {
	c := &checker{rules: rules, fset: token.NewFileSet(), packages: map[string]*pkg{}}
	c.readFields(tree)
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return skip(tree, name)
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		src, err := fs.ReadFile(tree, name)
		if err != nil {
			return err
		}
		c.file(name, src)
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.wholePackages()
	slices.Sort(c.faults)
	return c.faults, nil
}

func skip(tree fs.FS, dir string) error {
	if dir == "." {
		return nil
	}
	base := path.Base(dir)
	if base == "testdata" || base == "node_modules" || base[0] == '.' || base[0] == '_' {
		return fs.SkipDir
	}
	if _, err := fs.Stat(tree, path.Join(dir, "go.mod")); !errors.Is(err, fs.ErrNotExist) {
		return fs.SkipDir
	}
	return nil
}

type checker struct {
	rules    Rules
	fset     *token.FileSet
	packages map[string]*pkg
	fields   map[string]bool // nil: any name will do
	faults   []string
}

type pkg struct {
	name      string
	commented bool
}

func (c *checker) faultf(pos token.Pos, message string, args ...any) {
	p := c.fset.Position(pos)
	c.faults = append(c.faults, fmt.Sprintf("%s:%d: ", p.Filename, p.Line)+fmt.Sprintf(message, args...))
}

func (c *checker) file(name string, src []byte) {
	f, err := parser.ParseFile(c.fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		c.faults = append(c.faults, err.Error())
		return
	}
	if tidy, err := format.Source(src); err != nil || !bytes.Equal(tidy, src) {
		c.faultf(f.Package, "is not formatted (gofmt)")
	}
	if strings.HasSuffix(name, "_test.go") {
		c.sleeps(f)
		return
	}
	dir := path.Dir(name)
	c.imports(dir, f)
	c.inits(f)
	if !testSupport(dir) {
		c.words(name, src)
		c.logFields(f)
	}
	if public(dir) && !testSupport(dir) {
		c.exports(f)
	}
	p := c.packages[dir]
	if p == nil {
		p = &pkg{name: f.Name.Name}
		c.packages[dir] = p
	}
	if doc := f.Doc.Text(); strings.HasPrefix(doc, "Package "+f.Name.Name+" ") || f.Name.Name == "main" && doc != "" {
		p.commented = true
	}
}

// wholePackages checks what no single file can tell.
func (c *checker) wholePackages() {
	for dir, p := range c.packages {
		if _, ok := c.layerOf(dir); !ok {
			c.faults = append(c.faults, dir+":1: is in no layer (internal/style/rules.go)")
		}
		if !p.commented {
			c.faults = append(c.faults, fmt.Sprintf("%s:1: package %s has no comment that says what it is for", dir, p.name))
		}
	}
}

// imports checks layers and owners.
func (c *checker) imports(dir string, f *ast.File) {
	for _, spec := range f.Imports {
		what, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue
		}
		if rest, ours := c.ours(what); ours {
			if !c.mayImport(dir, rest) {
				c.faultf(spec.Pos(), "%s may not import %s", title(dir), title(rest))
			}
		} else if strings.Contains(strings.SplitN(what, "/", 2)[0], ".") {
			c.thirdParty(dir, what, spec.Pos())
		}
	}
}

// ours returns an import's directory in the tree.
func (c *checker) ours(what string) (dir string, ok bool) {
	if what == c.rules.Module {
		return ".", true
	}
	return strings.CutPrefix(what, c.rules.Module+"/")
}

func (c *checker) mayImport(dir, what string) bool {
	layer, ok := c.layerOf(dir)
	if !ok {
		return true // wholePackages tells
	}
	if what != "." && under(what, layer.Prefix) {
		return true
	}
	return slices.ContainsFunc(layer.May, func(may string) bool {
		return may == "*" || under(what, may)
	})
}

func title(dir string) string {
	if dir == "." {
		return "the root package"
	}
	return dir
}

func (c *checker) layerOf(dir string) (best Layer, ok bool) {
	for _, l := range c.rules.Layers {
		if under(dir, l.Prefix) && (!ok || len(l.Prefix) > len(best.Prefix)) {
			best, ok = l, true
		}
	}
	return best, ok
}

// under reports whether a directory is prefix or below it; "." is the root
// package alone.
func under(dir, prefix string) bool {
	return dir == prefix || strings.HasPrefix(dir, prefix+"/")
}

func (c *checker) thirdParty(dir, what string, pos token.Pos) {
	if testSupport(dir) {
		return
	}
	owner, ok := c.ownerOf(what)
	if !ok {
		c.faultf(pos, "%s has no owner (internal/style/rules.go)", what)
		return
	}
	if !slices.ContainsFunc(owner.Packages, func(p string) bool { return p == "*" || under(dir, p) }) {
		c.faultf(pos, "%s may not import %s, which belongs to %s", dir, what, strings.Join(owner.Packages, ", "))
	}
}

// testSupport reports whether only tests import dir: storetest, tunneltest, …
func testSupport(dir string) bool { return strings.HasSuffix(path.Base(dir), "test") }

func (c *checker) ownerOf(what string) (Owner, bool) {
	for _, o := range c.rules.Owners {
		if under(what, o.Module) {
			return o, true
		}
	}
	return Owner{}, false
}

// public reports whether packages elsewhere in the tree can import dir: what Go
// itself hides may speak of anything.
func public(dir string) bool {
	i := strings.LastIndex("/"+dir+"/", "/internal/")
	return i <= 0 // none, or the one at the top
}

// exports checks that the exported API mentions no type of a hidden module.
func (c *checker) exports(f *ast.File) {
	hidden := c.hiddenNames(f)
	if len(hidden) == 0 {
		return
	}
	report := func(n ast.Node) {
		ast.Inspect(n, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := sel.X.(*ast.Ident); ok && hidden[x.Name] != "" {
					c.faultf(sel.Pos(), "exported API mentions %s.%s of %s", x.Name, sel.Sel.Name, hidden[x.Name])
				}
			}
			return true
		})
	}
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && exportedReceiver(d) {
				report(d.Type)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				exportedParts(spec, report)
			}
		}
	}
}

// hiddenNames maps the names under which a file knows hidden modules to their
// import paths.
func (c *checker) hiddenNames(f *ast.File) map[string]string {
	names := map[string]string{}
	for _, spec := range f.Imports {
		what, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue
		}
		owner, ok := c.ownerOf(what)
		if !ok || !owner.Hidden {
			continue
		}
		if spec.Name != nil {
			names[spec.Name.Name] = what
		} else {
			names[guessName(what)] = what
		}
	}
	return names
}

// guessName is the name of a package as its import path suggests it:
// .../go-oidc/v3/oidc is oidc, .../quic-go is quic, .../go-jose/v4 is jose.
func guessName(importPath string) string {
	base := path.Base(importPath)
	if len(base) > 1 && base[0] == 'v' && base[1] >= '0' && base[1] <= '9' {
		base = path.Base(path.Dir(importPath))
	}
	return strings.TrimSuffix(strings.TrimPrefix(base, "go-"), "-go")
}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	t := d.Recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
		case *ast.IndexExpr:
			t = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return true
		}
	}
}

// exportedParts calls report for what other packages see of a declaration.
func exportedParts(spec ast.Spec, report func(ast.Node)) {
	switch s := spec.(type) {
	case *ast.ValueSpec:
		if s.Type != nil && slices.ContainsFunc(s.Names, func(n *ast.Ident) bool { return n.IsExported() }) {
			report(s.Type)
		}
	case *ast.TypeSpec:
		if !s.Name.IsExported() {
			return
		}
		structure, ok := s.Type.(*ast.StructType)
		if !ok {
			report(s.Type)
			return
		}
		for _, field := range structure.Fields.List {
			if len(field.Names) == 0 || slices.ContainsFunc(field.Names, func(n *ast.Ident) bool { return n.IsExported() }) {
				report(field.Type)
			}
		}
	}
}

// words checks for text that must not be there.
func (c *checker) words(name string, src []byte) {
	for _, word := range c.rules.Forbidden {
		if i := bytes.Index(src, []byte(word)); i >= 0 {
			c.faults = append(c.faults, fmt.Sprintf("%s:%d: %s", name, 1+bytes.Count(src[:i], []byte("\n")), word))
		}
	}
}

// fieldNames finds `name` in the first column of a table.
var fieldNames = regexp.MustCompile("`([a-z_]+)`")

func (c *checker) readFields(tree fs.FS) {
	doc, err := fs.ReadFile(tree, c.rules.Fields)
	if err != nil {
		return
	}
	c.fields = map[string]bool{}
	for line := range strings.Lines(string(doc)) {
		if columns := strings.Split(line, "|"); len(columns) > 2 {
			for _, m := range fieldNames.FindAllStringSubmatch(columns[1], -1) {
				c.fields[m[1]] = true
			}
		}
	}
}

// logFields checks that log.Info("message", "field", value, …) and its like use
// known names.
func (c *checker) logFields(f *ast.File) {
	if c.fields == nil {
		return
	}
	ast.Inspect(f, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok || !slices.Contains([]string{"Trace", "Debug", "Info", "Warn", "Error"}, sel.Sel.Name) {
			return true
		}
		if len(call.Args) < 3 || literal(call.Args[0]) == "" {
			return true
		}
		for i := 1; i < len(call.Args); i += 2 {
			if name := literal(call.Args[i]); name != "" && !c.fields[name] {
				c.faultf(call.Args[i].Pos(), "log field %q is not in %s", name, c.rules.Fields)
			}
		}
		return true
	})
}

// literal returns the text of a string literal, or "".
func literal(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return ""
	}
	s, err := strconv.Unquote(lit.Value)
	if err != nil {
		return ""
	}
	return s
}

// inits checks that nothing happens before main says so.
func (c *checker) inits(f *ast.File) {
	if ast.IsGenerated(f) {
		return
	}
	for _, decl := range f.Decls {
		if d, ok := decl.(*ast.FuncDecl); ok && d.Recv == nil && d.Name.Name == "init" {
			c.faultf(d.Pos(), "func init: let main, or a constructor, do it")
		}
	}
}

// sleeps checks that no test waits by hoping.
func (c *checker) sleeps(f *ast.File) {
	ast.Inspect(f, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "Sleep" {
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" {
				c.faultf(sel.Pos(), "time.Sleep in a test: wait for what has to happen, or use testing/synctest")
			}
		}
		return true
	})
}
