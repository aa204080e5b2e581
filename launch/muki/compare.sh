#!/usr/bin/env bash
# The table of MUKI against what it is compared with over learning rates and seeds, on one core or
# GPU, written into launch/bench/results: bash launch/muki/compare.sh [--seeds 1,2,3]
# [--plan launch/muki/two_teachers.json] [a.b=value ...]
# About an hour on one core. A second call goes on from where the first was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/common.sh
ensure_venv
prepare
exec python launch/bench/compare.py launch/muki/compare.yaml "$@"
