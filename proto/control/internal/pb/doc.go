// Package pb is what protoc makes of the .proto files of proto/control. Nothing
// outside that package sees it.
package pb
