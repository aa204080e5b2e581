"""The command ``dskd pairs``: which of two sentences a language model finds likelier."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.downstream.pairs import (
    EncodedSentences,
    Pair,
    PairScores,
    log_probabilities,
    pair_sentences,
    preferred,
    read_pairs,
    refuse_longer,
)
from dskd.errors import ConfigError
from dskd.models.build import build
from dskd.models.configs import config_of
from dskd.models.families import is_causal
from dskd.models.initial import initialise
from dskd.runs.finding import model_at
from dskd.runs.report import print_rows
from dskd.settings.model import Model
from dskd.system.device import on_gpu
from dskd.system.files import write_atomic
from dskd.system.log import bar

_RANDOM = 0
"""Seed of the model's twin with random weights."""


def main(words: Sequence[str]) -> int:
    """The command ``dskd pairs RUN_OR_FOLDER FILE [OUT]``; returns the exit status.

    Printed is, for each paradigm (``UID``) of FILE and in the mean over them, the share of pairs
    whose good sentence the model finds likelier; and, as a control, the same of the model with
    random weights, which length alone may put far from a half. OUT gets it as JSON.

    Raises:
        ConfigError: there is no language model, or an option is not for it.
        DataError: a line of FILE is no pair, or a sentence too long; it is named.
        DiskError: OUT cannot be written.
    """
    options = _parser().parse_args(words)
    if options.rows < 1:
        raise ConfigError(f"pairs: --rows {options.rows}; at least 1")
    folder, _ = model_at(options.path, "pairs")
    pairs = read_pairs(options.file)
    result = compare(folder, pairs, rows=options.rows, within_word=options.within_word)
    if options.out is not None:
        write_atomic(options.out, json.dumps(result, indent=1).encode(), "the scores")
    header = ["paradigm", "pairs", "accuracy", "random weights"]
    lines = [
        [name, str(of["pairs"]), f"{of['accuracy']:.3f}", f"{of['random']:.3f}"]
        for name, of in result["paradigms"].items()
    ]
    last = ["mean of the paradigms", str(result["pairs"])]
    last += [f"{result[name]:.3f}" for name in ("accuracy", "random")]
    print_rows(header, [*lines, last])
    return 0


def compare(folder: Path, pairs: list[Pair], *, rows: int, within_word: bool) -> dict[str, Any]:
    """The shares of pairs that the model in ``folder`` and its twin with random weights tell right.

    Args:
        rows: of one forward pass.
        within_word: see :func:`~dskd.downstream.pairs.log_probabilities`.

    Raises:
        ConfigError: no language model lies there, or it is causal and ``within_word`` is asked.
        DataError: a sentence has no tokens, or too many.
    """
    tokenizer = stored_tokenizer(str(folder), "pairs")
    named = Model(path=str(folder))
    causal = is_causal(config_of(named, where="pairs").model_type)
    if causal and within_word:
        raise ConfigError("pairs: --within-word: of masked LMs; a causal LM masks no token")
    sentences = pair_sentences(pairs, tokenizer, causal)
    device = torch.device("cuda" if on_gpu() else "cpu")
    of = {"objective": "causal" if causal else "masked", "block_size": 1}
    how = {"seed": 0, "ds": None, "dtype": torch.float32, "where": "pairs", "device": device}
    model = build(named, tokenizer, **of, **how).to(device)
    refuse_longer(sentences, pairs, model)
    options = {"rows": rows, "within_word": within_word}
    found = _scores(model, sentences, pairs, tokenizer, "Scoring pairs", **options)
    initialise(model, _RANDOM)
    control = _scores(model, sentences, pairs, tokenizer, "The same at random", **options)
    each = {
        name: {"pairs": len(right), "accuracy": found.shares[name], "random": control.shares[name]}
        for name, right in found.paradigms.items()
    }
    return {
        "model": str(folder),
        "score": "log-probability" if causal else "pseudo-log-likelihood",
        "within_word": within_word,
        "pairs": len(pairs),
        "all_pairs": found.all_pairs,
        "accuracy": found.mean,
        "random": control.mean,
        "paradigms": each,
    }


def _scores(
    model: PreTrainedModel,
    sentences: EncodedSentences,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    **options: Any,
) -> PairScores:
    with bar(text) as progress:
        sums_S = log_probabilities(model, sentences, tokenizer, **options, progress=progress)
    return preferred(pairs, sums_S)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dskd pairs",
        description="Say which sentence of each minimal pair (BLiMP) a language model, causal or "
        "masked, finds likelier.",
    )
    add = parser.add_argument
    add("path", type=Path, metavar="RUN_OR_FOLDER", help="a run's folder, or a model's")
    add(
        "file",
        type=Path,
        metavar="FILE",
        help="JSON lines with sentence_good, sentence_bad and UID, maybe .gz or .zst",
    )
    add("out", type=Path, nargs="?", metavar="OUT", help="JSON to write")
    add(
        "--within-word",
        action="store_true",
        help="of masked LMs: where a token is masked, mask the later ones of its word, too",
    )
    add("--rows", type=int, default=32, metavar="N", help="rows at a time (32)")
    return parser
