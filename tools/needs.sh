#!/usr/bin/env bash
# Installs what the tests need and this machine lacks. On a system without apt
# it says what is missing and fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# program : Debian package that brings it
needs=(
  cc:build-essential curl:curl ssh:openssh-client /usr/sbin/sshd:openssh-server psql:postgresql-client
  postgres:postgresql xdg-open:xdg-utils chromium:chromium certutil:libnss3-tools node:nodejs npm:npm
  strace:strace swtpm:swtpm
)

have() {
  case $1 in
    postgres) compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null ;;
    /*) [ -x "$1" ] ;;
    *) command -v "$1" >/dev/null ;;
  esac
}

missing=()
for need in "${needs[@]}"; do
  have "${need%%:*}" || missing+=("${need#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "needs: installing ${missing[*]}"
  if ! command -v apt-get >/dev/null; then
    echo "needs: no apt-get here; install ${missing[*]} by hand" >&2
    exit 1
  fi
  sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq
  # No service shall start because of a test.
  DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# One of the foreign identity providers comes from npm, at the versions in the lock
# file.
if ! node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 20 || (a == 20 && b >= 12) ? 0 : 1)'; then
  echo "needs: oidc-provider wants node 20.12 or later, this is $(node --version): see https://nodejs.org/en/download" >&2
  exit 1
fi
cd integration/testdata/oidc-provider
[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --silent --no-audit --no-fund
