#!/bin/sh
# Compose for this folder, as the folder's owner: ./compose.sh up -d | ps | logs -f | down
# It uses `docker compose` (2.x) where there is one, else `docker-compose` (1.29).
set -eu
cd "$(dirname "$0")"
RUN_AS=${RUN_AS:-$(stat -c %u:%g secrets)}
export RUN_AS
if [ "${RUN_AS%%:*}" = 0 ]; then
  echo "$PWD belongs to root, and the containers do not run as root: chown -R 1000:1000 $PWD" >&2
  exit 1
fi
if docker compose version >/dev/null 2>&1; then exec docker compose "$@"; fi
exec docker-compose "$@"
