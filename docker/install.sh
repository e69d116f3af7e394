#!/bin/sh
# Install what a file lists into /opt/venv, with the uv of requirements.txt, which Flower needs too:
#   install.sh FILE [OPTION...]
set -eu
file=$1 python=/opt/venv/bin/python
shift
if ! "$python" -m uv --version >/dev/null 2>&1; then
  sed -n '/^uv==/,/[^\\]$/p' /opt/requirements.txt >/tmp/uv.txt
  "$python" -m pip install --quiet --require-hashes --no-deps --requirement /tmp/uv.txt
  rm /tmp/uv.txt
fi
"$python" -m uv pip install --quiet --python "$python" --require-hashes --no-deps --compile-bytecode "$@" \
  --requirement "$file"
