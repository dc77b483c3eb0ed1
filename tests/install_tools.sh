#!/bin/sh
# Tools outside Python that some tests drive: a browser for the web page, Prometheus and its promtool for /metrics.
# Installed where that is possible (as root, with apt); elsewhere those tests skip and say what is missing.
set -u

missing=""
command -v chromium >/dev/null || missing="$missing chromium"
command -v prometheus >/dev/null && command -v promtool >/dev/null || missing="$missing prometheus"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
	echo "Not installed, so some tests will skip:$missing"
	exit 0
fi

echo "Installing for the tests:$missing"
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # one word a package
{ timeout 120 apt-get update && timeout 600 apt-get install --yes --no-install-recommends $missing; } >"$log" 2>&1 || {
	echo "That failed, so some tests will skip. The last lines of apt:"
	tail -n 5 "$log"
}
rm -f "$log"
