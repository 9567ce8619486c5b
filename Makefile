# Sallyport. `make help` lists what there is to make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The same flags everywhere, so that SQLite is compiled once.
export GOFLAGS := -trimpath $(GOFLAGS)

VERSION  ?= $(shell git describe --tags --dirty 2>/dev/null)
BUILT    ?= $(shell git log -1 --format=%cI 2>/dev/null)
LDFLAGS  := -s -w -X sallyport/cmd/internal/run.release=$(VERSION) -X sallyport/cmd/internal/run.built=$(BUILT)
PREFIX   ?= /usr/local
ARGS     ?=
DURATION ?= 1m
FUZZTIME ?= 1m
KILLS    ?= 1000
ROUNDS   ?= 3
SESSIONS ?= 1000000
TOOL     := go tool -modfile=tools/go.mod

# Only what opens SQLite needs a C compiler.
PURE := agent gateway authd policyd
CGO  := cached sallyport

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: $(PURE:%=bin/%) $(CGO:%=bin/%) ## bin/agent bin/gateway bin/authd bin/policyd bin/cached bin/sallyport

.PHONY: $(PURE:%=bin/%) $(CGO:%=bin/%)
$(PURE:%=bin/%):
	CGO_ENABLED=0 go build -ldflags '$(LDFLAGS)' -o $@ ./cmd/$(@F)
$(CGO:%=bin/%):
	CGO_ENABLED=1 go build -ldflags '$(LDFLAGS)' -o $@ ./cmd/$(@F)

.PHONY: demo
demo: bin/agent bin/sallyport ## the whole story on this machine; ARGS=--exit ends after it
	@bin/sallyport demo $(ARGS)

.PHONY: test
test: needs build unit race stack ## everything that runs in CI

.PHONY: needs
needs: ## install what the tests need and this machine lacks (Debian)
	@tools/needs.sh

.PHONY: unit
unit: property ## unit, conformance, command-line and fuzz-seed tests
	go vet ./...
	go test -shuffle=on ./...

# Each random policy meets eight people: 12,500 of them are 100,000 cases.
.PHONY: property
property: ## the laws of the policy language in 100,000 random cases (half a minute)
	go test -v -run Property ./policyd/policy -rapid.checks=12500 -rapid.nofailfile

.PHONY: race
race: ## the same under the race detector
	go test -race -shuffle=on ./...

.PHONY: stack
stack: build ## whole stacks: built binaries in one process and apart, foreign IdPs, ssh, psql, curl, Chromium
	cd integration && go vet ./... && SALLYPORT_BIN=$(CURDIR)/bin go test -shuffle=on -parallel 8 -timeout 25m ./...

.PHONY: lint
lint: ## gofumpt, go vet, staticcheck
	@bad=$$($(TOOL) gofumpt -l $$(git ls-files '*.go' | grep -v '\.pb\.go$$')); test -z "$$bad" || { echo "gofumpt would change:"; echo "$$bad"; exit 1; }
	go vet ./...
	$(TOOL) staticcheck ./...

.PHONY: fmt
fmt: ## format all Go files
	$(TOOL) gofumpt -w $$(git ls-files '*.go' | grep -v '\.pb\.go$$')

.PHONY: generate
generate: ## write generated files anew
	go generate ./...

.PHONY: fuzz
fuzz: ## each fuzz target for FUZZTIME (1m, 34 minutes in all)
	@bad=0; for pkg in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
	  for f in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$pkg/*_test.go | sed 's/^func //'); do \
	    echo "== $$pkg $$f"; (cd $$pkg && go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x .) || bad=1; \
	  done; done; exit $$bad

.PHONY: bench
bench: build scale ## both carriers beside ssh -L in ROUNDS (3) rounds, revocation, all benchmarks, sizes
	cd integration && SALLYPORT_BIN=$(CURDIR)/bin go test -run '^$$' -bench Peers -benchtime 1x -timeout 30m ./peers -args -rounds=$(ROUNDS) -json=$(CURDIR)/bin/bench.jsonl
	cd integration && SALLYPORT_BIN=$(CURDIR)/bin go test -run '^$$' -bench . -benchtime 1x -timeout 30m .
	go test -run '^$$' -bench . -benchmem -benchtime 0.3s ./... | grep -E 'Benchmark|^pkg|FAIL|fatal|panic|_test.go'
	@cd bin && echo && stat -c '%s %n' $(PURE) $(CGO) | awk 'BEGIN {print "| program | MB |\n|---|---:|"} {printf "| %s | %.1f |\n", $$2, $$1/1e6}'

# Store: an engine by itself. Scale: cached and policyd over loopback. The rest: policyd.
.PHONY: scale
scale: ## the benchmarks of SESSIONS (1,000,000) sessions, on every engine
	go test -p 1 -timeout 60m -run '^$$' -bench 'Store|Scale|Memory|Difference' ./cached/sqlite ./cached/postgres ./cmd/internal/store ./policyd -args -sessions=$(SESSIONS) | grep -E 'Benchmark|^pkg|FAIL|fatal|panic|_test.go|bench.go'

.PHONY: crash
crash: build ## kill -9 the engine and cached under load KILLS (1000) times each, with a ledger kept outside
	go test -count=1 -timeout 60m -v -run 'TestCase_L1_NothingAcknowledged' ./cached/sqlite -args -kills=$(KILLS)
	cd integration && SALLYPORT_BIN=$(CURDIR)/bin go test -count=1 -timeout 90m -v -run 'TestCrash' . -args -kills=$(KILLS)

.PHONY: soak
soak: build ## rolling restarts under load for DURATION (1m)
	cd integration && SALLYPORT_BIN=$(CURDIR)/bin go test -count=1 -timeout 0 -v -run 'TestSoak' . -args -duration=$(DURATION)

.PHONY: cover
cover: ## test coverage by function, coverage.html
	go test -coverprofile=coverage.out ./...
	go tool cover -func=coverage.out | tail -n 1
	go tool cover -html=coverage.out -o coverage.html

.PHONY: install
install: build ## copy the programs to PREFIX/bin (/usr/local)
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 bin/agent bin/gateway bin/authd bin/policyd bin/cached bin/sallyport $(DESTDIR)$(PREFIX)/bin

.PHONY: dist
dist: ## dist/: the agent for every desktop, the daemons for this machine, checksums
	rm -rf dist && mkdir -p dist
	for os in linux darwin windows; do for arch in amd64 arm64; do \
	  ext=; [ $$os = windows ] && ext=.exe; \
	  CGO_ENABLED=0 GOOS=$$os GOARCH=$$arch go build -ldflags '$(LDFLAGS)' -o dist/agent-$$os-$$arch$$ext ./cmd/agent; \
	done; done
	$(MAKE) build
	tar -C bin -czf dist/sallyport-$$(go env GOOS)-$$(go env GOARCH).tar.gz gateway authd policyd cached sallyport
	cd dist && sha256sum * > SHA256SUMS

.PHONY: clean
clean: ## remove what was built
	rm -rf bin dist coverage.out coverage.html

.PHONY: ci
ci: ## what .ci/run runs
	.ci/run
