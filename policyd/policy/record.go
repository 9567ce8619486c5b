package policy

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyport"

	"go.yaml.in/yaml/v3"
)

// maxRecordName is the longest type or field, in bytes.
const maxRecordName = 128

// record tests external data about somebody or something that a question is about.
type record struct {
	typ, field string
	of         recordSubject
	exists     Value   // which it must be: False or True; Unknown: it is not about that
	match      matcher // of a single value
	list       []test  // of a list; only one of both is there
}

// recordSubject is whose record it is.
type recordSubject uint8

const (
	ofUser recordSubject = iota
	ofDevice
	ofPeer
)

var recordSubjects = map[string]recordSubject{"user": ofUser, "device": ofDevice, "peer": ofPeer}

// recordKeys are all that a record may say beside its operators.
var recordKeys = []string{"type", "field", "of", "exists"}

// recordOperators are those of a single value; "=" is of numbers.
func recordOperators() map[string]compare {
	ops := maps.Clone(textOperators)
	maps.Copy(ops, orderOperators)
	ops["="], ops["has"], ops["exclude"] = isAny, has, exclude
	return ops
}

// parseRecord reads {type, field, of, OPERATOR…} or {type, of, exists}.
func parseRecord(p *parser, _ string, n *yaml.Node) (condition, bool) {
	ops := recordOperators()
	entries, ok := p.mapping(n, "record", append(slices.Sorted(maps.Keys(ops)), recordKeys...))
	if !ok {
		return condition{}, false
	}
	c := &record{exists: Unknown}
	for _, e := range entries {
		good := true
		switch e.key {
		case "type":
			c.typ, good = p.recordName(e.value, "type")
		case "field":
			c.field, good = p.recordName(e.value, "field")
		case "of":
			c.of, good = p.recordSubject(e.value)
		case "exists":
			var is bool
			is, good = p.boolean(e.value, "exists")
			c.exists = truth(is)
		default:
			good = p.recordTest(c, e, ops[e.key])
		}
		ok = ok && good
	}
	return leafOf(c), ok && p.wholeRecord(n, c)
}

// wholeRecord refuses what says too little or too much.
func (p *parser) wholeRecord(n *yaml.Node, c *record) bool {
	switch tests := len(c.match.tests) + len(c.list); {
	case c.typ == "":
		p.fail(n, "record needs a type")
	case c.exists != Unknown && (c.field != "" || tests > 0):
		p.fail(n, "exists is about the record as a whole; leave out field and the other operators, or exists")
	case c.exists != Unknown:
		return true
	case c.field == "":
		p.fail(n, "record needs a field, or exists: true")
	case tests == 0:
		p.fail(n, `record says nothing about the field; write an operator like "<": 10 or is: US, beside it`)
	case len(c.match.tests) > 0 && len(c.list) > 0:
		p.fail(n, "has and exclude look at a list, the other operators at a single value; a field is one of them")
	default:
		return true
	}
	return false
}

func (p *parser) recordTest(c *record, e entry, op compare) bool {
	t, ok := p.operand(e.key, op, e.value, "record", p.scalar)
	if !ok {
		return false
	}
	if _, isOrder := orderOperators[e.key]; (isOrder || e.key == "=") && t.of[0].kind != 'n' {
		p.fail(e.value, "record: %s compares numbers; %s is none", e.key, e.value.Value)
		return false
	}
	if op == has || op == exclude {
		c.list = append(c.list, t)
	} else {
		c.match.tests = append(c.match.tests, t)
	}
	return true
}

func (p *parser) recordName(n *yaml.Node, what string) (string, bool) {
	s, ok := p.nameText(n, "record's "+what)
	if ok && len(s) > maxRecordName {
		p.fail(n, "record's %s is longer than %d bytes", what, maxRecordName)
		return "", false
	}
	return s, ok
}

func (p *parser) recordSubject(n *yaml.Node) (recordSubject, bool) {
	s, ok := p.plainText(n, "of")
	if !ok {
		return 0, false
	}
	of, known := recordSubjects[s]
	if !known {
		p.fail(n, "of: %.40q is not user, device or peer%s", s, suggest(s, slices.Collect(maps.Keys(recordSubjects))))
	}
	return of, known
}

// id is whom the record is about; empty: nobody. A peer's is its address, which is
// printed for each question: it is the one criterion that allocates.
func (c *record) id(in *Input) string {
	switch {
	case c.of == ofPeer:
		if a := in.Request.Peer.Addr(); a.IsValid() {
			return a.Unmap().WithZone("").String()
		}
	case in.Person == nil:
	case c.of == ofUser:
		return string(in.Person.User.ID)
	case in.Person.Device != nil:
		return string(in.Person.Device.ID)
	}
	return ""
}

func (c *record) eval(in *Input) Value {
	if c.of == ofPeer {
		in.peer = true
	}
	id := c.id(in)
	if id == "" {
		return Unknown
	}
	fields, ok := in.external(c.typ, id)
	if c.exists != Unknown {
		return truth(ok == (c.exists == True))
	}
	return c.test(fields[c.field])
}

// test answers for a field's value; nil: there is none.
func (c *record) test(v any) Value {
	list, isList := v.([]any)
	switch {
	case v == nil || isList != (len(c.list) > 0):
		return Unknown
	case !isList:
		return c.match.value(v)
	}
	out := True
	for i := range c.list {
		out = min(out, testClaim(&c.list[i], list))
	}
	return out
}

func (c *record) path() string {
	if c.field == "" {
		return "record." + c.typ
	}
	return "record." + c.typ + "." + c.field
}

func (c *record) wanted(open bool) string {
	switch {
	case c.exists == True:
		return "exists"
	case c.exists == False:
		return "does not exist"
	case !open:
		return "the value that this rule asks for"
	}
	m := matcher{tests: append(slices.Clone(c.match.tests), c.list...)}
	return m.words()
}

func (c *record) found(in *Input) (string, time.Duration) {
	id := c.id(in)
	if id == "" && in.Person == nil && c.of != ofPeer {
		return noSession, 0
	}
	if id == "" {
		return "unknown (there is no device or address to look for)", 0
	}
	fields, ok := in.external(c.typ, id)
	switch {
	case c.exists != Unknown && ok:
		return "there", 0
	case c.exists != Unknown:
		return "not there", 0
	case !ok:
		return "unknown (no such record)", 0
	case fields[c.field] == nil:
		return "unknown (the record has no such field)", 0
	}
	return claimWords(fields[c.field]), 0
}

// subject is what a change of the record is told as, also of one that does not
// exist yet.
func (c *record) subject(in *Input) (sallyport.Subject, bool) {
	id := c.id(in)
	return sallyport.Subject{Kind: sallyport.SubjectRecord, ID: sallyport.ExternalID(c.typ, id)}, id != ""
}

func (c *record) note(in *Input, to *Inputs) {
	if c.of == ofDevice && in.Person != nil {
		noteDevice(in.Person.Device, to)
	}
	id := c.id(in)
	if id == "" {
		return
	}
	if to.Records == nil {
		to.Records = make(map[string]map[string]any)
	}
	key := sallyport.ExternalID(c.typ, id)
	fields, ok := in.external(c.typ, id)
	if !ok {
		to.Records[key] = nil
		return
	}
	if to.Records[key] == nil {
		to.Records[key] = make(map[string]any)
	}
	if c.field != "" {
		to.Records[key][c.field] = fields[c.field]
	}
}

func (c *record) recalled(from *Inputs) bool {
	if c.of == ofDevice && from.Device != nil && from.Device.ID == "" {
		return true // nobody's record
	}
	for key, fields := range from.Records {
		id, ok := strings.CutPrefix(key, c.typ+"/")
		if !ok || !c.isOf(id, from) {
			continue
		}
		_, looked := fields[c.field]
		return fields == nil || c.field == "" || looked
	}
	return false
}

// isOf reports whether id, of a recorded record, is that of c's subject: inputs
// name the device, but neither the user nor the address.
func (c *record) isOf(id string, from *Inputs) bool {
	isDevice := from.Device != nil && id == string(from.Device.ID)
	_, err := netip.ParseAddr(id)
	switch c.of {
	case ofDevice:
		return isDevice
	case ofPeer:
		return err == nil
	}
	return !isDevice && err != nil && !strings.Contains(id, "/")
}
