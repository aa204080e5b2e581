#!/usr/bin/env bash
# Run what a GPU would run on a device of type `cuda` in host memory, which is built here from
# tests/shadow/*.cpp with g++: bash launch/shadow.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
if ! command -v g++ >/dev/null; then
    echo "shadow device: skipped, there is no g++"
    exit 0
fi
ensure_venv test
prepare
export OMP_NUM_THREADS=1

# Build the two libraries for the installed torch; an interrupted build is made anew.
build() {
    local torch flags
    torch=$(python -c 'import torch; print(torch.__path__[0])')
    flags=(-O0 -std=c++20 -fPIC -shared -w "-I$torch/include"
        "-I$torch/include/torch/csrc/api/include" "-L$torch/lib" -lc10 -ltorch_cpu)
    rm -rf "$1.part"
    mkdir -p "$1.part"
    g++ tests/shadow/hooks.cpp -o "$1.part/libshadow_hooks.so" "${flags[@]}"
    g++ tests/shadow/device.cpp -o "$1.part/libshadow_device.so" "${flags[@]}" -ltorch
    mv "$1.part" "$1"
}

key=$({ cat tests/shadow/*.cpp && python -c 'import torch; print(torch.__version__)'; } | cksum)
SHADOW_DEVICE=$PWD/.shadow/${key// /-}
export SHADOW_DEVICE
[ -d "$SHADOW_DEVICE" ] || build "$SHADOW_DEVICE"
exec python -m pytest -p tests.shadow.device -n 2 --dist loadfile tests/shadow "$@"
