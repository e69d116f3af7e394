#!/bin/sh
# Create the server's certificates and a site's key. Needs openssl and ssh-keygen.
#   keys.sh ca FOLDER                  certificate authority: FOLDER/ca.key (keep it offline) and FOLDER/ca.crt
#   keys.sh server FOLDER ADDRESS...   server.key, server.pem (signed by FOLDER/ca.key), superexec.secret, and the
#                                      folder sites for the sites' public keys; ADDRESS: each DNS name or IPv4
#                                      address at which sites reach the server
#   keys.sh site FOLDER NAME           NAME.key, which never leaves the site, and NAME.pub for the server
# DAYS sets the validity of a certificate (ca: 3650, server: 365). Existing files are never overwritten.
set -eu
usage() { sed -n '2,8s/^# //p' "$0" >&2; exit 2; }
fresh() { for file; do [ ! -e "$file" ] || { echo "$file exists: move it away first" >&2; exit 1; }; done; }
[ $# -ge 2 ] || usage
command=$1 folder=$2; shift 2
umask 077; mkdir -p "$folder"; cd "$folder"

case $command in
ca)
  fresh ca.key ca.crt
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -keyout ca.key -out ca.crt -sha384 \
    -days "${DAYS:-3650}" -subj "/CN=fedmutual CA" -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
  ;;
server)
  [ $# -ge 1 ] || usage
  fresh server.key server.pem
  # superlink and localhost: the names that the server's own containers use
  names="DNS:superlink,DNS:localhost,IP:127.0.0.1"
  for address; do
    case $address in *[!0-9.]*) names="$names,DNS:$address" ;; *) names="$names,IP:$address" ;; esac
  done
  request=$(mktemp)
  trap 'rm -f "$request" "$request.ext"' EXIT
  printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nextendedKeyUsage=serverAuth\n' \
    "$names" >"$request.ext"
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout server.key -out "$request" \
    -subj "/CN=$1" 2>/dev/null
  openssl x509 -req -in "$request" -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" \
    -out server.pem -sha256 -days "${DAYS:-365}" -extfile "$request.ext" 2>/dev/null
  mkdir -p sites
  [ -e superexec.secret ] || openssl rand -hex 32 >superexec.secret
  ;;
site)
  [ $# -eq 1 ] || usage
  fresh "$1.key" "$1.pub"
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "$1" -f "$1.key"
  mv "$1.key.pub" "$1.pub"
  ;;
*) usage ;;
esac
