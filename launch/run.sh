#!/usr/bin/env bash
# Install, then run a recipe on this machine's GPUs: bash launch/run.sh RECIPE.yaml [a.b=value ...]
# Relative paths are relative to the checkout. A second call resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
if [ ! -f "${1:-}" ]; then
    echo "usage: bash launch/run.sh RECIPE.yaml [a.b=value ...]; no such file: '${1:-}'" >&2
    exit 2
fi
ensure_venv
prepare
run_recipe "$@"
