package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

// Limits of external data. Every policyd holds all of it in memory.
const (
	maxFields  = 64 << 10 // bytes of the JSON
	maxNesting = 8
	maxAbout   = 256 // bytes of the id that a record is about
)

var (
	recordType = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9._/-]{0,127}$`)
	fieldName  = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9._-]{0,63}$`)
)

func recordsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "records", Short: "external data that policies look at", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(recordsPutCommand(), recordsListCommand(), recordsRemoveCommand())
	return cmd
}

func recordsPutCommand() *cobra.Command {
	var call operatorCall
	var expires time.Duration
	cmd := &cobra.Command{
		Use:   "put TYPE ID [FILE|-] --config FILE [--expires 24h]",
		Short: "put what an outside system knows about a user, device or address",
		Long: `Puts the fields of a JSON object (at most 64 KiB; FILE, or - or nothing for
standard input) under a type ("risk") and the id that they are about, in place of
those that were there. Policies read them with the criterion "record"; live
connections are decided again within a second. With --expires they end by
themselves, and the criterion is then unknown.`,
		Args: recordArgs(2, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("expires") && expires <= 0 {
				return run.Usage("for example 24h", "--expires %s: want a time to come", expires)
			}
			fields, err := readFields(cmd.InOrStdin(), args[2:])
			if err != nil {
				return err
			}
			data := sallyport.External{Type: args[0], ID: args[1], Fields: fields}
			return call.do(cmd, func(ctx context.Context, records *control.Records) error {
				return putRecord(ctx, records, data, expires, cmd.OutOrStdout())
			})
		},
	}
	run.ConfigFlag(cmd, &call.file)
	cmd.Flags().DurationVar(&expires, "expires", 0, "end by itself after this `time`; without it: never")
	return cmd
}

func putRecord(ctx context.Context, records sallyport.Records, data sallyport.External, expires time.Duration, out io.Writer) error {
	op := sallyport.Put(sallyport.KindRecord, sallyport.ExternalID(data.Type, data.ID), data)
	if err := sameName(ctx, records, op.ID, data); err != nil {
		return err
	}
	if expires > 0 {
		op.Expires = time.Now().Add(expires)
	}
	rev, err := records.Apply(ctx, []sallyport.Op{op})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s put (revision %d)\n", op.ID, rev)
	return err
}

// sameName refuses to put data in the place of other data whose type and id are
// split elsewhere: "a/b" about "c" and "a" about "b/c" have one record.
func sameName(ctx context.Context, records sallyport.Records, id string, data sallyport.External) error {
	r, err := records.Get(ctx, sallyport.KindRecord, id)
	if errors.Is(err, sallyport.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if old, err := sallyport.Decode[sallyport.External](r); err == nil && (old.Type != data.Type || old.ID != data.ID) {
		return run.Usage("choose another type, or remove that one first", "%s is taken by type %q about %q", id, old.Type, old.ID)
	}
	return nil
}

func recordsRemoveCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "rm TYPE ID --config FILE",
		Short: "remove external data; criteria that look at it are unknown from then on",
		Args:  recordArgs(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id := sallyport.ExternalID(args[0], args[1])
			return call.do(cmd, func(ctx context.Context, records *control.Records) error {
				op := sallyport.Op{Kind: sallyport.KindRecord, ID: id, Delete: true, If: sallyport.Condition{Exists: true}}
				rev, err := records.Apply(ctx, []sallyport.Op{op})
				if errors.Is(err, sallyport.ErrConflict) {
					return run.Usage("list them with: sallyport records ls", "there is no record %q", id)
				}
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s removed (revision %d)\n", id, rev)
				return err
			})
		},
	}
	run.ConfigFlag(cmd, &call.file)
	return cmd
}

// recordArgs asks for a type, an id, and up to most arguments.
func recordArgs(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least || len(args) > most:
			return run.Usage("usage: "+cmd.UseLine(), "%d arguments, want %d", len(args), least)
		case !recordType.MatchString(args[0]):
			return run.Usage("for example risk; up to 128 letters, digits and . _ / -", "%.80q is no type of record", args[0])
		case !validAbout(args[1]):
			return run.Usage("name a user id, device id or address; up to 256 bytes", "%.80q is no id", args[1])
		}
		return nil
	}
}

func validAbout(id string) bool {
	if id == "" || len(id) > maxAbout || !utf8.ValidString(id) {
		return false
	}
	for _, r := range id {
		if unicode.IsControl(r) || unicode.IsSpace(r) {
			return false
		}
	}
	return true
}

// readFields reads the object from the file named by args, or from stdin.
func readFields(stdin io.Reader, args []string) (map[string]any, error) {
	in, name := stdin, "standard input"
	if len(args) > 0 && args[0] != "-" {
		f, err := os.Open(args[0])
		if err != nil {
			return nil, run.Usage("", "%v", err)
		}
		defer f.Close()
		in, name = f, args[0]
	}
	text, err := io.ReadAll(io.LimitReader(in, maxFields+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	fields, err := parseFields(text)
	if err != nil {
		return nil, run.Usage(`want one JSON object of fields, like {"score": 5}`, "%s: %v", name, err)
	}
	return fields, nil
}

// parseFields reads one JSON object strictly: a key that stands twice has no
// meaning that policy could rest on.
func parseFields(text []byte) (map[string]any, error) {
	if len(text) > maxFields {
		return nil, fmt.Errorf("more than %d bytes", maxFields)
	}
	if !utf8.Valid(text) {
		return nil, errors.New("not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	v, err := value(d, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	fields, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not an object")
	}
	for name := range fields {
		if !fieldName.MatchString(name) {
			return nil, fmt.Errorf("%.80q is no name of a field: up to 64 letters, digits and . _ -, a letter first", name)
		}
	}
	return fields, nil
}

// value reads the next value of d.
func value(d *json.Decoder, depth int) (any, error) {
	t, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	open, nested := t.(json.Delim)
	if nested && depth == maxNesting {
		return nil, fmt.Errorf("nested deeper than %d", maxNesting)
	}
	switch {
	case !nested:
		return t, nil
	case open == '[':
		list := []any{}
		for d.More() {
			v, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		return list, closing(d)
	}
	object := map[string]any{}
	for d.More() {
		k, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("not JSON: %w", err)
		}
		key := k.(string) // the decoder takes nothing else for a key
		if _, twice := object[key]; twice {
			return nil, fmt.Errorf("key %.80q stands twice", key)
		}
		if object[key], err = value(d, depth+1); err != nil {
			return nil, err
		}
	}
	return object, closing(d)
}

func closing(d *json.Decoder) error {
	if _, err := d.Token(); err != nil {
		return fmt.Errorf("not JSON: %w", err)
	}
	return nil
}

// listedRecord is external data as an operator sees it.
type listedRecord struct {
	sallyport.External
	Expires  time.Time          `json:"expires,omitzero"`
	Revision sallyport.Revision `json:"revision"`
}

var recordListing = listing[listedRecord]{
	schema: "sallyport.records/v1", key: "records",
	header: "TYPE\tID\tLEFT\tFIELDS",
	row: func(r listedRecord) string {
		left := "-"
		if !r.Expires.IsZero() {
			left = rounded(time.Until(r.Expires))
		}
		text, err := json.Marshal(r.Fields)
		if err != nil {
			text = []byte(err.Error())
		}
		return tabbed(r.Type, r.ID, left, string(text))
	},
}

func recordsListCommand() *cobra.Command {
	var call operatorCall
	var typ string
	cmd := &cobra.Command{
		Use:   "ls --config FILE [--type T] [-o text|json|jsonl]",
		Short: "list external data",
		Args:  run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return call.list(cmd, func(ctx context.Context, out output, records *control.Records) error {
				list, err := listRecords(ctx, records, typ)
				if err != nil {
					return err
				}
				return recordListing.write(out, list)
			})
		},
	}
	call.listFlags(cmd)
	cmd.Flags().StringVar(&typ, "type", "", "only records of this `type`")
	return cmd
}

func listRecords(ctx context.Context, l sallyport.Lister, typ string) ([]listedRecord, error) {
	records, err := l.List(ctx, sallyport.KindRecord)
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var list []listedRecord
	for _, r := range records {
		data, err := sallyport.Decode[sallyport.External](r)
		if err != nil {
			return nil, err
		}
		if typ == "" || data.Type == typ {
			list = append(list, listedRecord{data, r.Expires, r.Revision})
		}
	}
	slices.SortFunc(list, func(a, b listedRecord) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.ID, b.ID))
	})
	return list, nil
}
