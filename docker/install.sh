#!/bin/sh
# Install what a file lists into /opt/venv with uv, which does not stay in the image:  install.sh FILE [OPTION...]
set -eu
file=$1
shift
python -m venv /tmp/uv
/tmp/uv/bin/pip install --quiet uv==0.13.9
/tmp/uv/bin/uv pip install --quiet --python /opt/venv --require-hashes --no-deps --compile-bytecode "$@" --requirement "$file"
rm -rf /tmp/uv
