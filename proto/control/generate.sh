#!/bin/sh
# Generates internal/pb from the .proto files here. Needs protoc (Debian:
# protobuf-compiler); the Go plugins are those of tools/go.mod.
set -eu
cd "$(dirname "$0")/../.."
plugin() { go tool -modfile=tools/go.mod -n "$1"; }

pb=proto/control/internal/pb
protoc --proto_path=. \
  --plugin=protoc-gen-go="$(plugin protoc-gen-go)" \
  --plugin=protoc-gen-go-grpc="$(plugin protoc-gen-go-grpc)" \
  --go_out=$pb --go_opt=module=sallyport/$pb \
  --go-grpc_out=$pb --go-grpc_opt=module=sallyport/$pb \
  proto/control/*.proto
