package config

import (
	"reflect"
)

// Schema returns the JSON Schema of the configuration file.
func Schema() map[string]any {
	s := schemaOf(reflect.TypeFor[File](), "", nil)
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = "Sallyport configuration"
	return s
}

// schemaOf returns the JSON Schema (draft 2020-12) of what the decoder takes for
// type t. about maps key paths (without list indexes) to what the key means.
func schemaOf(t reflect.Type, path string, about map[string]string) map[string]any {
	s := typeSchema(t, path, about)
	if text := about[path]; text != "" {
		s["description"] = text
	}
	return s
}

func typeSchema(t reflect.Type, path string, about map[string]string) map[string]any {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == nodeType:
		return map[string]any{}
	case t == durationType:
		return map[string]any{"anyOf": []any{
			map[string]any{"type": "string", "pattern": `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`},
			map[string]any{"const": 0},
		}}
	case reflect.PointerTo(t).Implements(textUnmarshaler):
		return map[string]any{"type": "string"}
	}
	switch t.Kind() {
	case reflect.Struct:
		properties := map[string]any{}
		for _, f := range fieldsOf(t) {
			properties[f.name] = schemaOf(f.typ, join(path, f.name), about)
		}
		return map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": schemaOf(t.Elem(), join(path, "*"), about)}
	case reflect.Slice:
		return map[string]any{"type": "array", "items": schemaOf(t.Elem(), path+"[]", about)}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Float64:
		return map[string]any{"type": "number"}
	case reflect.Interface:
		return map[string]any{}
	case reflect.String:
		return map[string]any{"type": "string"}
	}
	return map[string]any{"type": "integer"}
}
