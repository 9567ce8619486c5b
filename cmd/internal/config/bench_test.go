package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// large is a site of n routes with as many rules each; no two policies are alike.
func large(n, rules int) string {
	var b strings.Builder
	b.WriteString("domain: corp.example\ndata_dir: data\nroutes:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - from: tcp://db%d.internal:5432\n    policy:\n", i)
		for j := range rules {
			fmt.Fprintf(&b, "      - name: r%d\n        allow: {and: [{groups: {has: team-%d-%d}}, {device: {disk_encrypted: true}}]}\n", j, i, j)
		}
	}
	return b.String()
}

func BenchmarkLoad(b *testing.B) {
	for _, size := range []struct{ routes, rules int }{{1_000, 10}, {10_000, 10}} {
		b.Run(fmt.Sprintf("routes=%d/rules=%d", size.routes, size.rules), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "sallyport.yaml")
			text := large(size.routes, size.rules)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Load(path, Tool); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
