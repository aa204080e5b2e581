#!/usr/bin/env bash
# Compile the kernels ahead of time with the oldest Triton that is supported and with the current
# one, whatever .venv has: bash launch/aot.sh [options of launch/bench/aot.py, such as --record]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
ensure_venv test
prepare
unset TRITON_INTERPRET

# Put triton==$1 into a folder of its own; an interrupted installation is made anew.
provide() {
    local folder=.aot/triton-$1
    if [ -d "$folder" ]; then return; fi
    rm -rf "$folder.part"
    python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
        --no-deps --target "$folder.part" "triton==$1"
    mv "$folder.part" "$folder"
}

check() {
    local version=$1
    shift
    PYTHONPATH=.aot/triton-$version python launch/bench/aot.py \
        --targets sm90 --spread sm80,sm100 "$@" >".aot/$version.txt" 2>&1
}

oldest=3.6.0 current=3.9.0 status=0
mkdir -p .aot
provide "$oldest"
provide "$current"
check "$oldest" "$@" &
if [ $# -gt 0 ]; then wait $! || status=1; fi # one after the other: both may write the budget
check "$current" "$@" || status=1
wait $! || status=1
cat ".aot/$oldest.txt" ".aot/$current.txt"
exit "$status"
