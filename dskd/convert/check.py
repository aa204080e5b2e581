"""What a user can judge a conversion by: the folder read again, and its loss on plain English.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dskd.batch import IGNORE, Batch
from dskd.data.foreign import raised_as
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.data.tokenizers import encoder, end_id, start_id
from dskd.errors import ConfigError, DataError
from dskd.models.build import construct
from dskd.models.configs import check_vocabulary
from dskd.models.families import longest_row, positions_of, tie_head_bias
from dskd.models.frozen import evaluating
from dskd.models.heads import ObjectiveName
from dskd.models.reading import load_weights

PARAGRAPH = """\
The old mill stands at the end of a narrow road that follows the river through the valley. For more
than two hundred years the people of the village brought their corn there in the autumn, and in the
evening they sat together by the fire and talked about the harvest, the weather and the price of
bread. When the railway came, most of the young people left to look for work in the city, and the
wheel of the mill stood still. Last year a couple from the coast bought the house. They repaired the
roof, cleaned the garden and opened a small school, where children learn how flour is made and how
to bake bread with their own hands. In spring, when the snow has melted in the mountains, the water
is high enough to turn the wheel again.
"""
_GROUPS = 7
"""One token in so many is masked at a time, and every token once: 1/7 is nearly 15 %."""
_MOST = 8192
"""Most tokens that are scored."""
_CHARACTERS = 1 << 17
"""Most characters that are read of a file."""


def reloaded(
    folder: Path, objective: ObjectiveName, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedModel:
    """The model of a folder as a run would read it, in fp32.

    Raises:
        ConfigError: it cannot be read, or its vocabulary is not the tokenizer's.
    """
    where = str(folder)
    config = AutoConfig.from_pretrained(folder)
    if tokenizer is not None:
        check_vocabulary(config, tokenizer, where)
    model = construct(config, "auto", None, torch.float32, where, objective)
    tie_head_bias(model)
    load_weights(model, folder, where)
    return model


def text_of(path: Path | None) -> str:
    """The text that is scored, in one line: the first part of a file, or a paragraph of English.

    Raises:
        DataError: the file cannot be read, or there is nothing in it.
    """
    text = PARAGRAPH
    if path is not None:
        with (
            raised_as(DataError, f"--text: cannot read {path}"),
            path.open(encoding="utf-8") as file,
        ):
            text = file.read(_CHARACTERS)
    line = " ".join(text.split())
    if not line:
        raise DataError(f"--text: {path} has no words to score")
    return line


def refuse_short(
    text: str, tokenizer: PreTrainedTokenizerBase | None, objective: ObjectiveName
) -> None:
    """Refuse a text that :func:`report` could not score, before anything is written.

    Raises:
        DataError: it has a single token, or none.
    """
    scored = tokenizer is not None and objective != "classification"
    if scored and len(_ids(tokenizer, text)) < 2:
        raise DataError("--text: too few tokens to score")


def report(
    folder: Path, objective: ObjectiveName, text: str, source: Path | None, written: bool
) -> list[str]:
    """Lines on a converted folder for its user.

    Args:
        text: of :func:`text_of`.
        source: the file that it is from; None: the paragraph.
        written: whether a tokenizer lies in the folder.

    Raises:
        ConfigError: it cannot be read again.
    """
    tokenizer = stored_tokenizer(str(folder), str(folder)) if written else None
    model = reloaded(folder, objective, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    first = f"read again: {type(model).__name__}, {parameters:,} parameters"
    if objective == "classification":
        what = "score it on labelled rows (dskd predict) before you trust it"
        return [first, f"NOT checked end to end: a head for classes has no loss on text; {what}"]
    if tokenizer is None:
        what = "without a tokenizer there is no loss on text"
        return [first, f"NOT checked end to end: {what}"]
    nats, count, unknown = loss_on(model, tokenizer, objective, text)
    name = "masked LM loss (one token in seven masked)" if objective == "masked" else "LM loss"
    name_of_text = "the built-in English paragraph" if source is None else str(source)
    missed = f", {unknown} of them unknown" if unknown else ""
    if source is None and 10 * unknown > count:
        missed += " (it is not the language of this vocabulary: give --text FILE)"
    guessing = math.log(model.config.vocab_size)
    lines = [
        first,
        f"{name}: {nats:.3f} nats a token, over {count} tokens of {name_of_text}{missed}; "
        f"guessing has {guessing:.2f}",
    ]
    judge = "a sound model is far below guessing, a wrong vocabulary or a swapped tensor near it"
    if objective == "masked":
        judge = (
            "on its own language a sound RoBERTa or BERT has 1 to 3 nats, a wrong vocabulary or a "
            "swapped tensor more than 7"
        )
    return [*lines, f"this loss is the only end-to-end evidence of the conversion: {judge}"]


def loss_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
    text: str,
) -> tuple[float, int, int]:
    """Mean loss of a text in nats, how many tokens it is over, how many of them are unknown.

    A masked LM predicts every token once, with one in seven masked at a time, the same ones in
    every call; a causal LM every token but the first of each row. The text has two or more.
    """
    ids = _ids(tokenizer, text)
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for ids_BT, labels_BT in _rows(ids, model, tokenizer, objective):
            positions = positions_of(model, _batch(ids_BT, labels_BT))
            losses_N = cross_entropy(
                positions.logits_NV.double(), positions.labels_N, reduction="none"
            )
            total, count = total + float(losses_N.sum()), count + len(losses_N)
    return total / count, count, ids.count(tokenizer.unk_token_id)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return encoder(tokenizer, "--text").encode(text.strip(), add_special_tokens=False).ids[:_MOST]


def _rows(
    ids: list[int],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels, int64 [B, T] each, of the windows that a text is cut into."""
    start, end = start_id(tokenizer, objective), end_id(tokenizer, objective)
    before = [] if start is None else [start]
    behind = [end] if objective == "masked" and end is not None else []
    width = longest_row(model.config) - len(before) - len(behind)
    if width < 1:
        raise ConfigError(f"its {longest_row(model.config)} positions are too few for a token")
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(ids), width):
        window = ids[first : first + width]
        row_T = torch.tensor([*before, *window, *behind])
        if objective == "causal":
            yield row_T[None], torch.cat([row_T[1:], torch.tensor([IGNORE])])[None]
            continue
        order = torch.randperm(len(window), generator=generator) + len(before)
        for group in order.split(-(-len(order) // _GROUPS)):
            labels_T = torch.full_like(row_T, IGNORE)
            labels_T[group] = row_T[group]
            masked_T = row_T.clone()
            masked_T[group] = tokenizer.mask_token_id
            yield masked_T[None], labels_T[None]


def _batch(ids_BT: Tensor, labels_BT: Tensor) -> Batch:
    ids_B = torch.arange(len(ids_BT))
    return Batch.of(
        row_ids_B=ids_B,
        domains_B=torch.zeros_like(ids_B),
        ids_BT=ids_BT,
        mask_BT=torch.ones_like(ids_BT),
        labels_BT=labels_BT,
    )
