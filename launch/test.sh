#!/usr/bin/env bash
# Install what the tests need and run them: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
ensure_venv test
prepare
export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
exec python -m pytest -n 2 --dist loadfile "$@"
