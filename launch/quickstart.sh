#!/usr/bin/env bash
# Install, then Knowledge Inheritance end to end on the built-in corpus: bash launch/quickstart.sh
# [a.b=value ...]. A second call resumes, or says what is done. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
ensure_venv
prepare
# The recipe's 8 rows a step at once on the ranks there are: a CPU spends half the time of rows one
# by one, and the trajectory is the same.
run_recipe launch/ki/quickstart.yaml "train.micro_batch=$((8 / RANKS))" "$@"
