"""Pure functions of the number of completed optimiser steps: inheritance rate and learning rate.

Nothing here has state, so a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import math
from typing import Literal

from dskd.errors import ConfigError
from dskd.settings.run import Train

RateSchedule = Literal["linear", "switch", "constant", "cosine"]


def inheritance_rate(kind: RateSchedule, step: int, end: int, start: float = 1.0) -> float:
    """Weight alpha of the teacher's term after ``step`` completed steps (KI, section 3.2).

    ``linear``: ``start * max(0, 1 - step / end)``; ``cosine``: half a cosine from ``start`` at 0 to
    0 at ``end``; ``switch``: ``start`` before ``end``, 0 from there on; ``constant``: ``start``.
    It never rises with ``step``.

    Raises:
        ConfigError: ``linear`` or ``cosine`` without an ``end`` to fall towards.
    """
    if kind == "constant":
        return start
    if kind == "switch":
        return start if step < end else 0.0
    if end < 1:
        raise ConfigError(
            f"a {kind} inheritance rate needs at least 1 step to fall to 0, not {end}"
        )
    if step >= end:
        return 0.0
    if kind == "linear":
        return start * (1.0 - step / end)
    return start * 0.5 * (1.0 + math.cos(math.pi * step / end))


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of the optimiser step taken after ``step`` completed ones.

    Rises linearly from 0 (the very first step of a warm-up does not move the weights, as in
    fairseq) to ``train.lr`` at ``train.warmup``, then follows ``train.schedule`` down to
    ``train.end_lr`` at ``train.steps``. ``linear`` is ``polynomial`` with power 1; ``constant``
    stays at ``train.lr``.
    """
    if train.warmup > 0 and step <= train.warmup:
        return step / train.warmup * train.lr
    if train.schedule == "constant":
        return train.lr
    if step >= train.steps:
        return train.end_lr
    progress = (step - train.warmup) / (train.steps - train.warmup)
    if train.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        share = (1.0 - progress) ** (train.power if train.schedule == "polynomial" else 1.0)
    return (train.lr - train.end_lr) * share + train.end_lr
