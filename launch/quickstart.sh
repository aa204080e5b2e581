#!/usr/bin/env bash
# Install, then Knowledge Inheritance end to end on the built-in corpus: bash launch/quickstart.sh
# [a.b=value ...]. A second call resumes, or says what is done. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
ensure_venv
prepare
run_recipe launch/ki/quickstart.yaml "$@"
