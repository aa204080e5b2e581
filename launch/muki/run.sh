#!/usr/bin/env bash
# Several classifiers made one student, one of the recipes beside this file, from text to exported
# and scored students: bash launch/muki/run.sh NAME [a.b=value ...]
#   debug      built-in rows, about a minute (the default)
#   compare    built-in rows: MUKI, its baselines and its bounds, once each (the table: compare.sh)
#   cnews      the original's: two BERT-base of five classes each, Chinese news of yours
#   minilm     teachers and students that start from a small trained encoder
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${1:-debug}
exec bash "$here/../run.sh" "$here/$name.yaml" "${@:2}"
