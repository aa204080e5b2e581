#!/usr/bin/env bash
# The table of Self-Evolution against its controls over seeds, on one core or GPU, written into
# launch/bench/results: bash launch/self_evolution/compare.sh [--seeds 1,2,3] [a.b=value ...]
# A second call goes on from where the first was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/common.sh
ensure_venv
prepare
exec python launch/bench/compare.py launch/self_evolution/compare.yaml "$@"
