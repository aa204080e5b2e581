#!/usr/bin/env bash
# Self-Evolution, one of the recipes beside this file, from text to an exported and scored model:
# bash launch/self_evolution/run.sh NAME [a.b=value ...]
#   debug          built-in corpus, about a minute (the default)
#   compare        built-in corpus: Self-Evolution and its controls, once each (the table: compare.sh)
#   paper_roberta  RoBERTa-base trained on by itself, as in the paper
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${1:-debug}
exec bash "$here/../run.sh" "$here/$name.yaml" "${@:2}"
