package posture

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"path"
	"strings"

	"sallyport"
)

// linux adds what a Linux system tells. It reads through m.FS and m.Run only, so
// that recordings of other machines are read by the same code on any system.
func (m Machine) linux(ctx context.Context, values map[string]any) {
	if v := m.osVersion(); v != "" {
		values[sallyport.FactOSVersion] = v
	}
	if v := m.line("proc/sys/kernel/osrelease"); v != "" {
		values[sallyport.FactKernel] = v
	}
	for name, read := range map[string]func(context.Context) (bool, bool){
		sallyport.FactDiskEncrypted: m.diskEncrypted,
		sallyport.FactFirewall:      m.firewall,
		sallyport.FactScreenLock:    m.screenLock,
		sallyport.FactSecureBoot:    m.secureBoot,
	} {
		if value, known := read(ctx); known {
			values[name] = value
		}
	}
}

func (m Machine) line(name string) string {
	b, err := fs.ReadFile(m.FS, name)
	if err != nil {
		return ""
	}
	first, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(first)
}

// osVersion is VERSION_ID of os-release(5), if it is made of dotted numbers.
func (m Machine) osVersion() string {
	b, err := fs.ReadFile(m.FS, "etc/os-release")
	if err != nil {
		b, err = fs.ReadFile(m.FS, "usr/lib/os-release")
	}
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_ID=")
		v = strings.Trim(v, `"'`)
		if ok && v != "" && strings.Trim(v, "0123456789.") == "" {
			return v
		}
	}
	return ""
}

// mount is the line of the root file system in mountinfo (proc(5)).
type mount struct{ device, fstype, source string }

// rootMount returns the last mount on /, which is the one on top.
func (m Machine) rootMount() (mount, bool) {
	b, err := fs.ReadFile(m.FS, "proc/self/mountinfo")
	if err != nil {
		return mount{}, false
	}
	var root mount
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if ok && len(f) > 4 && len(g) > 1 && f[4] == "/" {
			root = mount{device: f[2], fstype: g[0], source: g[1]}
		}
	}
	return root, root.fstype != ""
}

// diskEncrypted tells whether the root file system lies on encrypted storage as
// a whole. File systems whose storage cannot be seen from here (overlay, network,
// memory) are unknown.
func (m Machine) diskEncrypted(ctx context.Context) (value, known bool) {
	root, ok := m.rootMount()
	if !ok {
		return false, false
	}
	switch root.fstype {
	case "zfs":
		out, err := m.Run(ctx, "zfs", "get", "-H", "-o", "value", "encryption", root.source)
		if err != nil {
			return false, false
		}
		v := strings.TrimSpace(string(out))
		return v != "off", v != "" && v != "-"
	case "btrfs":
		return m.btrfs(root.source)
	}
	if strings.HasPrefix(root.device, "0:") { // no block device
		return false, false
	}
	return m.encrypted("sys/dev/block/"+root.device, 0)
}

// btrfs has an anonymous device number and may span several devices: all of them
// must be encrypted.
func (m Machine) btrfs(source string) (value, known bool) {
	block := m.blockName(source)
	if block == "" {
		return false, false
	}
	sets, _ := fs.Glob(m.FS, "sys/fs/btrfs/*/devices/"+block)
	if len(sets) != 1 {
		return m.encrypted("sys/class/block/"+block, 0)
	}
	return m.allEncrypted(path.Dir(sets[0]), 0)
}

// blockName turns /dev/mapper/x or /dev/sda2 into the kernel's name.
func (m Machine) blockName(source string) string {
	name, ok := strings.CutPrefix(source, "/dev/mapper/")
	if !ok {
		if name, ok = strings.CutPrefix(source, "/dev/"); ok && !strings.Contains(name, "/") {
			return name
		}
		return ""
	}
	names, _ := fs.Glob(m.FS, "sys/class/block/dm-*/dm/name")
	for _, n := range names {
		if m.line(n) == name {
			return path.Base(path.Dir(path.Dir(n)))
		}
	}
	return ""
}

// cryptTargets are the device mapper's encrypting targets, by the start of the
// uuid that cryptsetup gives them. CRYPT-VERITY and CRYPT-INTEGRITY do not hide
// anything.
var cryptTargets = []string{"CRYPT-LUKS", "CRYPT-PLAIN", "CRYPT-TCRYPT", "CRYPT-BITLK", "CRYPT-FVAULT2", "CRYPT-LOOPAES"}

// encrypted follows a block device down to what it is made of.
func (m Machine) encrypted(dir string, depth int) (value, known bool) {
	if depth > 8 {
		return false, false
	}
	uuid := m.line(dir + "/dm/uuid")
	for _, prefix := range cryptTargets {
		if strings.HasPrefix(uuid, prefix) {
			return true, true
		}
	}
	if slaves, err := fs.ReadDir(m.FS, dir+"/slaves"); err == nil && len(slaves) > 0 {
		return m.allEncrypted(dir+"/slaves", depth+1)
	}
	if _, err := fs.Stat(m.FS, dir+"/loop"); err == nil {
		return false, false // a file on some other file system
	}
	if _, err := fs.Stat(m.FS, dir+"/dev"); err != nil {
		return false, false // not a device that sysfs shows us
	}
	return false, true
}

func (m Machine) allEncrypted(dir string, depth int) (value, known bool) {
	parts, err := fs.ReadDir(m.FS, dir)
	if err != nil || len(parts) == 0 {
		return false, false
	}
	for _, p := range parts {
		if value, known := m.encrypted("sys/class/block/"+p.Name(), depth); !known || !value {
			return false, known
		}
	}
	return true, true
}

// firewall tells whether a packet filter guards the input of this machine: a
// base chain on the input hook that drops or rejects something. Only root may
// look; for others a running firewalld, or an active and enabled ufw, says so too.
func (m Machine) firewall(ctx context.Context) (value, known bool) {
	out, err := m.Run(ctx, "nft", "list", "ruleset")
	if err == nil {
		return nftGuards(out), true
	}
	if !errors.Is(err, fs.ErrPermission) {
		if out, err := m.Run(ctx, "iptables", "-S", "INPUT"); err == nil {
			return iptablesGuards(out), true
		}
	}
	if m.active(ctx, "firewalld") || m.active(ctx, "ufw") && m.ufwEnabled() {
		return true, true
	}
	return false, false
}

func (m Machine) active(ctx context.Context, unit string) bool {
	out, err := m.Run(ctx, "systemctl", "is-active", unit)
	return err == nil && strings.TrimSpace(string(out)) == "active"
}

func (m Machine) ufwEnabled() bool {
	b, err := fs.ReadFile(m.FS, "etc/ufw/ufw.conf")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if strings.EqualFold(strings.ReplaceAll(strings.TrimSpace(line), " ", ""), "ENABLED=yes") {
			return true
		}
	}
	return false
}

// nftGuards reads "nft list ruleset".
func nftGuards(ruleset []byte) bool {
	lines := bufio.NewScanner(bytes.NewReader(ruleset))
	lines.Buffer(nil, 1<<20)
	input := false
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		switch {
		case strings.HasPrefix(line, "chain "):
			input = false
		case strings.HasPrefix(line, "type filter hook input "):
			input = true
			if strings.Contains(line, "policy drop") {
				return true
			}
		case input && closes(line):
			return true
		}
	}
	return false
}

func closes(rule string) bool {
	for _, word := range strings.Fields(rule) {
		if word == "drop" || word == "reject" {
			return true
		}
	}
	return false
}

// iptablesGuards reads "iptables -S INPUT".
func iptablesGuards(rules []byte) bool {
	for line := range strings.Lines(string(rules)) {
		line = strings.TrimSpace(line)
		if line == "-P INPUT DROP" || strings.HasSuffix(line, "-j DROP") || strings.Contains(line, "-j REJECT") {
			return true
		}
	}
	return false
}

// screenLock asks the desktop that runs; without one nobody knows.
func (m Machine) screenLock(ctx context.Context) (value, known bool) {
	desktop := strings.ToUpper(m.Env("XDG_CURRENT_DESKTOP"))
	switch {
	case strings.Contains(desktop, "GNOME") || strings.Contains(desktop, "UNITY"):
		lock, err1 := m.Run(ctx, "gsettings", "get", "org.gnome.desktop.screensaver", "lock-enabled")
		idle, err2 := m.Run(ctx, "gsettings", "get", "org.gnome.desktop.session", "idle-delay")
		if err1 != nil || err2 != nil {
			return false, false
		}
		return strings.TrimSpace(string(lock)) == "true" && strings.TrimSpace(string(idle)) != "uint32 0", true
	case strings.Contains(desktop, "KDE"):
		b, err := fs.ReadFile(m.FS, path.Join(m.Home, ".config/kscreenlockerrc"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, false
		}
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Autolock="); ok {
				return v == "true", true
			}
		}
		return true, true // Plasma's default
	}
	return false, false
}

// secureBoot reads the variable of the UEFI specification, section 3.3: four
// bytes of attributes from efivarfs, then 1 or 0.
func (m Machine) secureBoot(context.Context) (value, known bool) {
	b, err := fs.ReadFile(m.FS, "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
	if err != nil || len(b) != 5 {
		return false, false
	}
	return b[4] == 1, true
}
