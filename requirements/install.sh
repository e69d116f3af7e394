#!/bin/sh
# Install what a file here lists, and this checkout, into a virtual environment:  install.sh VENV run|dev
# With uv, which comes into the environment first; with pip where uv cannot be had or fails; and where the index lacks a
# locked file (a mirror, another system), the newest versions that pyproject.toml allows.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$1/bin/python wanted=$here/$2.txt
extras=dev
test "$2" = dev || extras=export,pretrained
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
uv() { "$python" -m uv --quiet "$@"; }

export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-120}"
if uv --version >/dev/null 2>&1 || pip install uv; then
  uv pip install --python "$python" --require-hashes --requirement "$wanted" &&
    uv pip install --python "$python" --no-deps --editable "$here/.." && exit
fi
echo "uv could not install $wanted; pip installs it now." >&2
if pip install --require-hashes --requirement "$wanted"; then
  pip install --no-deps --editable "$here/.." && exit
fi
echo "Not all locked versions can be had; pip installs the newest ones that pyproject.toml allows." >&2
pip install --editable "$here/..[$extras]"
