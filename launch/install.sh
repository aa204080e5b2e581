#!/usr/bin/env bash
# Make .venv with the tested pins, or leave it alone when it is right: bash launch/install.sh [test]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
ensure_venv "$@"
