#!/usr/bin/env bash
# Installs what the tests need and this machine lacks. On a system without apt
# it says what is missing and fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# program : Debian package that brings it
needs=(
  cc:build-essential curl:curl ssh:openssh-client /usr/sbin/sshd:openssh-server psql:postgresql-client
  postgres:postgresql chromium:chromium certutil:libnss3-tools node:nodejs npm:npm
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

# The second foreign identity provider comes from npm, at the version in the lock file.
if [ -f integration/testdata/oidc-provider/package-lock.json ]; then
  (cd integration/testdata/oidc-provider && { [ -d node_modules ] || npm ci --silent --no-audit --no-fund; })
fi
