"""How a causal model goes on with the prompts of a file: ``dskd generate``.

One process, or as many as a launcher starts, which share the prompts::

    deepspeed --num_gpus 8 --module dskd.cli generate RUN_OR_FOLDER PROMPTS OUT
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dskd.data.foreign import raised_as
from dskd.data.json_files import checked_text, json_rows, json_type, row_value
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.data.tokenizers import (
    encoder,
    first_of,
    start_id,
    tokenizer_fingerprint,
    vocabulary_size,
)
from dskd.engine import engine
from dskd.errors import ConfigError, DataError
from dskd.models.build import build, model_fingerprint
from dskd.models.configs import config_of
from dskd.models.continuation_files import own_tokens, write_continuations
from dskd.models.families import is_causal, longest_row
from dskd.models.generate import Decoding, Sampling
from dskd.runs.finding import model_at
from dskd.settings.model import Model
from dskd.system import dist, watch
from dskd.system.device import DTYPES, on_gpu
from dskd.system.doing import at_stage
from dskd.system.files import file_hash
from dskd.system.log import say
from dskd.system.rows_file import RowsFile

_ENCODED = 4096  # prompts at a time


def main(words: Sequence[str]) -> int:
    """The command ``dskd generate RUN_OR_FOLDER PROMPTS OUT``; returns the exit status.

    OUT gets a JSON line for each prompt, in order: the new ``text``, its tokens ``ids``, and
    whether it ``ended`` by itself, not at ``--max-new-tokens`` or where the model's positions do.
    What is drawn for a prompt depends on ``--seed`` and on its place in the file alone.

    Raises:
        ConfigError: there is no causal LM, or an option is out of range; OUT is there already.
        DataError: a line of PROMPTS makes no prompt; it is named, before anything is generated.
        StoreError: OUT holds, or began with, what other options, prompts or another model made.
        DiskError: OUT cannot be written.
        NonFiniteError: the model's logits are not finite; names the prompt, counted from 0.
    """
    options = _parser().parse_args(words)
    try:
        status = _run(options)
    except BaseException as problem:
        watch.end(problem)
        raise
    watch.end(status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dskd generate",
        description="Write how a causal model goes on with each prompt. Called again after a stop, "
        "it goes on; of the model's generation_config.json the end tokens count, no other wish.",
    )
    add = parser.add_argument
    add("path", type=Path, metavar="RUN_OR_FOLDER", help="a run's folder, or a model's")
    add("file", type=Path, metavar="PROMPTS", help="JSON lines, maybe .gz")
    add("out", type=Path, metavar="OUT", help="JSON lines to write, one a prompt")
    add("--text", default="prompt", metavar="KEY", help="of text or a list of token ids (prompt)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="of each prompt (256)")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--temperature", type=float, metavar="T", help="draw by softmax(logits / T)")
    add("--seed", type=int, metavar="N", help="of the draws (0)")
    add("--batch", type=int, default=32, metavar="N", help="prompts at a time (32)")
    add("--precision", choices=DTYPES, default="fp32", help="of weights and activations (fp32)")
    return parser


class _Work(NamedTuple):
    """What is to be generated, and by what."""

    options: argparse.Namespace
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    prompts: list[NDArray[np.int32]]


def _run(options: argparse.Namespace) -> int:
    grouped = "RANK" in os.environ
    device = engine.start() if grouped else torch.device("cuda" if on_gpu() else "cpu")
    at_stage("generate")
    with dist.agreed():
        work = _work(options)
    made_of = dist.on_rank0(lambda: _made_of(work))
    with RowsFile(options.out, "the generated rows", made_of, len(work.prompts)) as out:
        if not out.complete:
            _generate(work, device, out)
    say(f"{len(work.prompts)} rows: {options.out}")
    if grouped:
        engine.stop()
    return 0


def _work(options: argparse.Namespace) -> _Work:
    """All that can be refused before the model is there."""
    sampling = _sampling(options)
    folder, _ = model_at(options.path, "generate")
    config = _causal_config(folder)
    tokenizer = stored_tokenizer(str(folder), "generate")
    decoding = _decoding(options.max_new_tokens, sampling, folder, tokenizer, config)
    return _Work(options, folder, tokenizer, decoding, _prompts(options, tokenizer, config))


def _generate(work: _Work, device: torch.device, out: RowsFile) -> None:
    """Write the rows that are missing."""

    def model() -> PreTrainedModel:
        with dist.agreed():
            return build(
                Model(path=str(work.folder)),
                work.tokenizer,
                objective="causal",
                block_size=1,
                seed=0,
                ds=None,
                dtype=DTYPES[work.options.precision],
                where="generate",
                device=device,
            ).to(device)

    def line(number: int, ids: list[int]) -> dict[str, Any]:
        del number
        own = own_tokens(ids, work.decoding)
        text = work.tokenizer.decode(own, clean_up_tokenization_spaces=False)
        return {"text": text, "ids": own, "ended": len(own) < len(ids)}

    how = {"batch": work.options.batch, "doing": "generate"}
    write_continuations(out, model, work.prompts, work.decoding, line, **how)


def _sampling(options: argparse.Namespace) -> Sampling | None:
    """How tokens are drawn; None: they are not.

    Raises:
        ConfigError: an option is out of range.
    """
    for name in ("max_new_tokens", "top_k", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"generate: {option}: {value} is less than 1")
    heat = options.temperature
    if heat is not None and not (0 < heat < math.inf):
        raise ConfigError(
            f"generate: --temperature: {heat:g} is not above 0; without it, and without --top-k, "
            "the most likely token is taken"
        )
    if heat is None and options.top_k is None:
        if options.seed is not None:
            raise ConfigError("generate: --seed: without --top-k or --temperature nothing is drawn")
        return None
    return Sampling(options.seed or 0, options.top_k, 1.0 if heat is None else heat)


def _causal_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder's model, if that is a causal LM.

    Raises:
        ConfigError: it is not.
    """
    config = config_of(Model(path=str(folder)), where="generate")
    causal = is_causal(config.model_type)
    # GPT-2, Llama ... are trained as classifiers, too.
    fits = {MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__} if causal else set()
    names = config.architectures or fits
    if not fits.intersection(names):
        raise ConfigError(
            f"generate: {folder} holds a {' or '.join(names) or config.model_type}, which is no "
            f"causal LM"
        )
    return config


def _prompts(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[NDArray[np.int32]]:
    """The tokens of each prompt of the file.

    Raises:
        DataError: there is none, or a line makes none; names file and line.
    """
    if not options.file.is_file():
        raise DataError(f"generate: {options.file}: no such file")
    backend, start = encoder(tokenizer, "generate"), start_id(tokenizer, "causal")
    begin = [] if start is None else [start]
    positions = longest_row(config)
    found: list[NDArray[np.int32]] = []
    lines = json_rows(options.file, int, int)
    while some := list(islice(lines, _ENCODED)):
        values = [row_value(row, options.text, place, "prompt") for place, row in some]
        texts = [
            checked_text(value, place, f"under the key {options.text!r}")
            for (place, _), value in zip(some, values, strict=True)
            if not isinstance(value, list)
        ]
        with raised_as(DataError, f"{options.file}: the tokenizer cannot encode the prompts"):
            encoded = iter(backend.encode_batch(texts, add_special_tokens=False))
        for (place, _), value in zip(some, values, strict=True):
            if isinstance(value, list):
                ids = _checked_ids(value, place, config.vocab_size)
            else:
                ids = begin + next(encoded).ids
            if not 0 < len(ids) < positions:
                raise DataError(
                    f"{place}: the prompt has {len(ids)} tokens; between 1 and {positions - 1} "
                    "leave a position for another"
                )
            found.append(np.array(ids, np.int32))
    if not found:
        raise DataError(f"{options.file}: no prompt in it")
    return found


def _checked_ids(value: list[Any], place: str, size: int) -> list[int]:
    for token in value:
        if type(token) is not int:  # a bool is an int, too
            raise DataError(f"{place}: the prompt's list holds {json_type(token)}, and no token id")
        if not 0 <= token < size:
            raise DataError(f"{place}: the prompt's token {token} is none of the model's {size}")
    return value


def _decoding(
    longest: int,
    sampling: Sampling | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> Decoding:
    """How rows are gone on with, and which tokens end them: the tokenizer's and the model's.

    Raises:
        ConfigError: there is none.
    """
    own = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        with raised_as(ConfigError, f"generate: generation_config.json of {folder}"):
            own = GenerationConfig.from_pretrained(folder).eos_token_id
    own = own if isinstance(own, list) else [own]
    ends = {end for end in (*own, tokenizer.eos_token_id) if end is not None}
    if not ends:
        raise ConfigError(f"generate: {folder}: there is no end token (eos_token)")
    pad = first_of(tokenizer.pad_token_id, min(ends))
    assert pad is not None
    size = vocabulary_size(tokenizer)
    return Decoding(longest, longest_row(config), size, tuple(sorted(ends)), pad, sampling)


def _made_of(work: _Work) -> dict[str, Any]:
    """All that the rows depend on; in 16 bits what is computed together, too."""
    options, sampling = work.options, work.decoding.sampling
    found = {
        "model": model_fingerprint(Model(path=str(work.folder)), seed=0, where="generate"),
        "tokenizer": tokenizer_fingerprint(work.tokenizer),
        "ends": list(work.decoding.ends),
        "PROMPTS": file_hash(options.file),
        "--text": options.text,
        "--max-new-tokens": options.max_new_tokens,
        "--top-k": options.top_k,
        "--temperature": None if sampling is None else sampling.temperature,
        "--seed": None if sampling is None else sampling.seed,
        "--precision": options.precision,
    }
    if options.precision != "fp32":
        found |= {"--batch": options.batch, "ranks": dist.world()}
    return found
