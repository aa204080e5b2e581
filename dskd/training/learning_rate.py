"""Pure functions of the number of completed optimiser steps: inheritance rate and learning rate.

Nothing here has state, so a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import math

from dskd.settings.length import is_in_steps
from dskd.settings.run import Train


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of the optimiser step taken after ``step`` completed ones.

    Rises linearly from 0 (the very first step of a warm-up does not move the weights, as in
    fairseq) to ``train.lr`` at ``train.warmup``, then follows ``train.schedule`` down to
    ``train.end_lr`` at ``train.steps``. ``linear`` is ``polynomial`` with power 1; ``constant``
    stays at ``train.lr``.
    """
    assert is_in_steps(train), "a rate is a function of steps: settings.length.with_steps first"
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
