"""How a causal model goes on with many prompts, in a file that a later call goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedModel

from dskd.models.generate import Decoding, continuations
from dskd.system import dist
from dskd.system.log import bar, say
from dskd.system.rows_file import RowsFile

_WINDOW = 4  # batches of each rank, of which the rows are written together


def write_continuations(
    out: RowsFile,
    model: Callable[[], PreTrainedModel],
    prompts: Sequence[NDArray[Any]],
    decoding: Decoding,
    line: Callable[[int, list[int]], Any],
    *,
    batch: int,
    doing: str,
) -> None:
    """Write the rows that are missing and finish the file (collective).

    Args:
        out: opened, of as many rows as there are prompts.
        model: builds the model; called unless all rows are there.
        prompts: integers, the tokens of each; its place is the number of its sample.
        line: a row, given the prompt's place and the new tokens.
        batch: prompts of a forward pass.
        doing: what a progress bar and messages call it.

    Raises:
        DiskError: the file cannot be written.
        NonFiniteError: the model's logits are not finite.
    """
    # Where a window begins does not depend on where an earlier call was stopped, so that in 16 bits
    # its batches are the same.
    total, window = len(prompts), _WINDOW * batch * dist.world()
    first = out.keep(window)
    if 0 < first < total:
        say(f"{doing}: goes on behind the {first} of {total} rows that are written")
    made = model() if first < total else None
    with bar(doing) as report:
        while made is not None and first < total:
            some = range(first, min(first + window, total))
            new = continuations(
                made,
                [prompts[number].tolist() for number in some],
                decoding,
                numbers=some,
                batch=batch,
                progress=lambda done, _, first=first: report(first + done, total),
            )
            out.append(line(number, ids) for number, ids in zip(some, new, strict=True))
            first = some.stop
    out.finish()


def own_tokens(ids: list[int], decoding: Decoding) -> list[int]:
    """The tokens of a continuation without the one that ended it, if one did."""
    return ids[: len(ids) - (ids[-1] in decoding.ends)]
