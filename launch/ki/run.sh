#!/usr/bin/env bash
# Knowledge Inheritance, one of the recipes beside this file: bash launch/ki/run.sh NAME [a.b=value ...]
#   quickstart     built-in corpus, minutes on 2 cores (the default)
#   generations    built-in corpus, three generations, each student the next one's teacher
#   panel          built-in corpus, two teachers mixed token by token
#   domains        your corpora, one teacher per domain
#   paper_roberta  the paper's shape: RoBERTa-base teaches base-plus
#   llama_topk     a Llama-shaped student and its teacher's cached top-64
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${1:-quickstart}
exec bash "$here/../run.sh" "$here/$name.yaml" "${@:2}"
