#!/bin/sh
# Write down the version and the hashes of every package that `make` installs, for all systems: run.txt (what running
# needs) and dev.txt (the tests, lint and documentation too), from pyproject.toml. Needs uv. Versions in these files are
# kept while they fit; a removed file is made of the newest.
set -eu
cd "$(dirname "$0")"
lock() {
  uv pip compile ../pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --quiet \
    --no-emit-index-url --custom-compile-command requirements/lock.sh "$@" >/dev/null
}
lock --extra dev -o dev.txt
lock --extra export --extra pretrained --constraint dev.txt -o run.txt
