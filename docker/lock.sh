#!/bin/sh
# Write down the version and the hashes of every package of the image: torch.txt and requirements.txt, from
# requirements.in. Needs uv. Versions in these files are kept while they fit; a removed file is made of the newest.
#   lock.sh [ADDRESS]   ADDRESS: PyTorch's index for another build than the package index's (see Dockerfile)
set -eu
cd "$(dirname "$0")"
lock() {
  uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --quiet \
    --custom-compile-command docker/lock.sh "$@" >/dev/null
}
grep '^torch\(vision\)\{0,1\}[<>=]' requirements.in | lock ${1:+--index "$1"} -o torch.txt -
# requirements.txt holds the rest: other builds of PyTorch need none of NVIDIA's packages
only=$(sed -n 's/^\(torch\|torchvision\|triton\|nvidia-[a-z0-9-]*\|cuda-[a-z0-9-]*\)==.*/--no-emit-package \1/p' torch.txt)
# shellcheck disable=SC2086
lock ${1:+--index "$1"} --constraint torch.txt $only -o requirements.txt requirements.in
