//go:build tools

// Package peers names the programs that go.mod pins.
package peers

import _ "golang.zx2c4.com/wireguard"
