#!/usr/bin/env bash
# Weight-Inherited Distillation, one of the recipes beside this file, from text to an exported and
# scored student: bash launch/wid/run.sh NAME [a.b=value ...]
#   debug          built-in corpus, about a minute (the default)
#   compare        built-in corpus: WID and its controls, once each (the table: compare.sh)
#   bert_dim       the paper's: BERT-base 12-768 to 12-192, narrower heads
#   bert_head      the same by whole heads
#   llama_ki       SmolLM2-360M to the width of SmolLM2-135M, inheriting its predictions besides
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${1:-debug}
exec bash "$here/../run.sh" "$here/$name.yaml" "${@:2}"
