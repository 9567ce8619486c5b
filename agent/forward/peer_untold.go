//go:build !linux

package forward

import "errors"

var errNobodyTells = errors.New("this system does not tell who connects")
