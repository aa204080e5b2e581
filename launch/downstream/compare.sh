#!/usr/bin/env bash
# What the quickstart's models and WID's students are worth on small public tasks, beside a bag of
# words, written into launch/bench/results: bash launch/downstream/compare.sh FOLDER
# FOLDER has the tasks as `python launch/bench/downstream.py` says. About two hours on one core; a
# second call goes on from where the first was stopped.
set -euo pipefail
folder=$(realpath "${1:?FOLDER is missing: the folder with the tasks}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash launch/quickstart.sh
source launch/common.sh
ensure_venv test
prepare
run_recipe launch/wid/compare.yaml "train.micro_batch=$((32 / RANKS))" \
    runs.{wid-dim,wid-head}.train.lr=0.002 runs.wid-ki.train.lr=0.004 \
    runs.{slice,kd,scratch}.train.lr=0.01
python launch/bench/downstream.py sample "$folder" runs/downstream/data
dskd downstream launch/downstream/quickstart.yaml
dskd downstream launch/wid/compare.yaml
python launch/bench/downstream.py table runs/downstream/data \
    "launch/bench/results/$(date +%F)-downstream" \
    quickstart=runs/downstream/quickstart/downstream.json wid=runs/wid_compare/downstream.json
