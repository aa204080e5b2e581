#!/usr/bin/env bash
# Tasks learnt one after the other, one of the recipes beside this file, from text to exported and
# scored models: bash launch/l2kd/run.sh NAME [a.b=value ...]
#   debug      two small tasks, about a minute on a CPU (the default)
#   toys       three small tasks, every way once, about half an hour (the table: study.sh)
#   wcs        the original's: WOZ, CNN/DailyMail, WikiSQL; GPT-2, files of yours below data/
#   nlg, tc    the original's: five domains of sentences; five data sets of classes; files of yours
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${1:-debug}
cd "$here/../.."
if [ "$name" = debug ] || [ "$name" = toys ]; then
    source launch/common.sh
    ensure_venv
    # the tokenizer comes last
    [ -d runs/l2kd_toys/data/tokenizer ] || .venv/bin/python launch/l2kd/toys.py runs/l2kd_toys/data
fi
exec bash launch/run.sh "$here/$name.yaml" "${@:2}"
