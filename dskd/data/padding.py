"""How much of the batches of packed rows is padding, which costs what tokens cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dskd.settings.data import Data

_MULTIPLE = 8  # of the width of a batch, as matrix products like it
_MUCH = 0.2


def padded_widths(lengths: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Tokens and padding of a row in a batch whose longest row is it: rounded up to a multiple of
    8, but at most ``block_size``.

    Args:
        lengths: int64, tokens of rows.
    """
    return np.minimum(-(-lengths // _MULTIPLE) * _MULTIPLE, block_size)


def padding_share(lengths_R: NDArray[np.int64], block_size: int, micro_batch: int) -> float:
    """The share of padding in all that micro-batches hold, as they are on average: each is as wide
    as its longest row (:func:`padded_widths`), and its rows come in any order.

    Args:
        lengths_R: int64 [R], tokens of all rows of a split.
        block_size: most tokens of a row.
        micro_batch: rows of a micro-batch.
    """
    rows_W = np.bincount(padded_widths(lengths_R, block_size))
    # A micro-batch is at most so wide if each of its rows is.
    at_most_W = (np.cumsum(rows_W) / len(lengths_R)) ** micro_batch
    width = float(np.sum(np.arange(len(rows_W)) * np.diff(at_most_W, prepend=0.0)))
    return max(0.0, 1 - float(lengths_R.mean()) / width)


def padding_lines(lengths_R: NDArray[np.int64], data: Data, micro_batch: int) -> list[str]:
    """What a reader is told of the padding of packed rows, and above 20 % what would help.

    Args:
        lengths_R: int64 [R], tokens of the training rows.
        data: the settings by which they are packed.
        micro_batch: rows of a micro-batch.
    """
    share = padding_share(lengths_R, data.block_size, micro_batch)
    lines = [f"  padding: {share:.1%} of what micro-batches of {micro_batch} training rows hold"]
    if share <= _MUCH:
        return lines
    costs = f"leaves {share:.0%} padding, which costs what tokens cost"
    if data.packing == "contiguous":  # so of sources of hardly a row each
        return [*lines, f"warning: data.block_size: {data.block_size} {costs}; fewer leave less"]
    helps = "contiguous leaves next to none"
    return [*lines, f"warning: data.packing: {data.packing} {costs}; {helps}"]
