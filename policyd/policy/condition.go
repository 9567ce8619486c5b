package policy

// operator joins conditions, or is leaf: a criterion.
type operator uint8

const (
	leaf operator = iota
	and           // all
	or            // any
	not           // none: ¬A ∧ ¬B
	nor           // at least one fails: ¬A ∨ ¬B
)

var operators = map[string]operator{"and": and, "or": or, "not": not, "nor": nor}

// condition is a node of a checked rule.
type condition struct {
	op operator
	of []condition // when op is no leaf; never empty
	is criterion   // when op is leaf
	at place
}

// place is where something stands in a policy's text; both count from 1.
type place struct{ line, column int32 }

// eval stops at the first child that settles the answer.
func (c *condition) eval(in *Input) Value {
	switch c.op {
	case and:
		return least(c.of, in)
	case or:
		return most(c.of, in)
	case not:
		return most(c.of, in).not()
	case nor:
		return least(c.of, in).not()
	}
	return c.is.eval(in)
}

func least(cs []condition, in *Input) Value {
	v := True
	for i := range cs {
		if v = min(v, cs[i].eval(in)); v == False {
			break
		}
	}
	return v
}

func most(cs []condition, in *Input) Value {
	v := False
	for i := range cs {
		if v = max(v, cs[i].eval(in)); v == True {
			break
		}
	}
	return v
}

// full is eval without stopping early: every criterion is looked at. It must
// always agree with eval.
func (c *condition) full(in *Input) Value {
	if c.op == leaf {
		return c.is.eval(in)
	}
	lo, hi := True, False
	for i := range c.of {
		v := c.of[i].full(in)
		lo, hi = min(lo, v), max(hi, v)
	}
	switch c.op {
	case and:
		return lo
	case or:
		return hi
	case not:
		return hi.not()
	default:
		return lo.not()
	}
}

// blame calls each for the criteria that keep c from being want (True or False),
// with the value that each of them would have to have.
func (c *condition) blame(in *Input, want Value, each func(is criterion, got, want Value)) {
	if c.op == leaf {
		if got := c.is.eval(in); got != want {
			each(c.is, got, want)
		}
		return
	}
	if c.full(in) == want {
		return
	}
	if c.op == not || c.op == nor {
		want = want.not()
	}
	for i := range c.of {
		c.of[i].blame(in, want, each)
	}
}

// each calls f for every criterion below c.
func (c *condition) each(f func(criterion)) {
	if c.op == leaf {
		f(c.is)
	}
	for i := range c.of {
		c.of[i].each(f)
	}
}
