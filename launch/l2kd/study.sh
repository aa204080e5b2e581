#!/usr/bin/env bash
# What ways to learn three small tasks in turn forget, over seeds and shares of wrong labels, as a
# table in launch/bench/results:
#   bash launch/l2kd/study.sh [--seeds 1,2,3] [--jobs 2] [a.b=value ...]
# About fifty minutes on two cores. A second call goes on from where the first was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/common.sh
ensure_venv
prepare
exec python launch/bench/lifelong.py launch/l2kd/toys.yaml "$@"
