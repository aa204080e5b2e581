"""The logits of linear teachers, chunk after chunk; on a GPU, those of the next chunk meanwhile.

Shape letters: N tokens, C of them in a chunk, M of them of one teacher, W columns, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.batch import SAME, LogitMap
from dskd.fused.chunking import Buffer, chunks, operand, project
from dskd.fused.mixed_logits import MIXTURE_BUFFERS, Mixture


class _Head(NamedTuple):
    """One teacher: its hidden states [M, E], which rows of all they are, and its logit map if that
    is not left to whoever reads the logits."""

    rows: slice
    hidden_ME: Tensor
    weight_WE: Tensor
    bias_W: Tensor | None
    map: LogitMap


def runs_ahead(device: torch.device) -> bool:
    """Whether the logits of the next chunk are made while those of a chunk are used."""
    return device.type == "cuda"


def teacher_logits(
    teachers: list[Tensor],
    count: int,
    size: int,
    dtype: torch.dtype,
    mixture: Mixture | None = None,
    maps: Sequence[float] = (),
) -> Iterator[Tensor]:
    """The teachers' logits [C, W] of chunk after chunk, each good until the next one is asked for.

    The products of a teacher need nothing of the student, whose loss and gradients are bound by
    memory in part. So on a GPU they go to a stream of their own, one chunk ahead.

    Args:
        teachers: hidden states, weight and bias (empty: none) of each, whose rows follow one
            another.
        count: the rows of all.
        size: rows of a chunk.
        dtype: of the logits.
        mixture: each teacher has all rows, and the logits are their mixture's.
        maps: scale and softcap of each teacher, which its logits get here; none: nobody's do.
    """
    heads = _heads(teachers, mixture is not None, maps)
    weight_WE = heads[0].weight_WE
    device, columns = weight_WE.device, len(weight_WE)
    spans = [*chunks(count, size)]
    ahead = runs_ahead(device) and len(spans) > 1
    buffers = [Buffer(size, columns, dtype, device) for _ in range(2 if ahead else 1)]
    spares = 0 if mixture is None else MIXTURE_BUFFERS
    spare = [Buffer(size, columns, dtype, device) for _ in range(spares)]

    def make(number: int) -> Tensor:
        rows = spans[number]
        out_CW = buffers[number % len(buffers)].first(rows.stop - rows.start)
        if mixture is None:
            _project(heads, rows, out_CW)
        else:
            mixture.make(out_CW, [partial(_project, [head], rows) for head in heads], spare)
        return out_CW

    if ahead:
        yield from _ahead(make, len(spans), device)
    else:
        yield from map(make, range(len(spans)))


def _heads(teachers: list[Tensor], together: bool, maps: Sequence[float]) -> list[_Head]:
    """``together``: the rows of each are all rows."""
    heads, first = [], 0
    logit_maps = [LogitMap(*each) for each in zip(maps[::2], maps[1::2], strict=True)]
    logit_maps = logit_maps or [SAME] * (len(teachers) // 3)
    parts = (*(teachers[i::3] for i in range(3)), logit_maps)
    for hidden_ME, weight_WE, bias_W, own in zip(*parts, strict=True):
        rows = slice(first, first + len(hidden_ME))
        operands = (operand(hidden_ME), operand(weight_WE))
        heads.append(_Head(rows, *operands, operand(bias_W) if len(bias_W) else None, own))
        first = 0 if together else rows.stop
    return heads


def _project(heads: list[_Head], rows: slice, out_CW: Tensor) -> None:
    """The logits of some rows, each by its teacher."""
    for head in heads:
        begin, end = max(rows.start, head.rows.start), min(rows.stop, head.rows.stop)
        if begin < end:
            hidden_ME = head.hidden_ME[begin - head.rows.start : end - head.rows.start]
            out_ME = out_CW[begin - rows.start : end - rows.start]
            project(hidden_ME, head.weight_WE, head.bias_W, out_ME)
            if head.map != SAME:
                _map_in_place(out_ME, head.map)


def _map_in_place(logits_ME: Tensor, of: LogitMap) -> None:
    logits_ME.mul_(of.scale)
    if of.softcap:
        masked_ME = logits_ME.isneginf()
        logits_ME.div_(of.softcap).tanh_().mul_(of.softcap).masked_fill_(masked_ME, -torch.inf)


def _ahead(make: Callable[[int], Tensor], number: int, device: torch.device) -> Iterator[Tensor]:
    """``make(i)`` for one chunk after the other, on a stream of its own and one chunk ahead."""
    main, side = torch.cuda.current_stream(device), _side_stream(device)

    def begin(i: int) -> tuple[Tensor, torch.cuda.Event]:
        # what is read is there by then, and the chunk before the last is done with its buffer
        side.wait_stream(main)
        with torch.cuda.stream(side):
            return make(i), side.record_event()

    try:
        following = begin(0)
        for i in range(number):
            logits_CW, done = following
            main.wait_event(done)
            if i + 1 < number:
                following = begin(i + 1)
            yield logits_CW
    finally:
        # Before any memory is given back, which is the main stream's. Not by `record_stream`: what
        # is freed so is free only once the device has got there, and the next call would take more.
        main.wait_stream(side)


@cache  # one for all calls: each stream has a workspace of cuBLAS's
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
