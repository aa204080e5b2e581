"""Whether two runs, as their settings say, come to the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dskd.settings.data import HardTokens
from dskd.settings.parsing import show
from dskd.settings.run import Run

# Settings that say where, how fast or how far, but not what comes out.
_WITHOUT_EFFECT = re.compile(
    r"(?:out|until|deepspeed|log_every|checkpoint\..*|evaluation\.(?:every|micro_batch)|data\.folder"
    r"|data\.(?:sources|validation)\.\d+\.path"  # the rows' content is compared instead
    r"|data\.masking\.(?:store|micro_batch|rows_per_shard)"
    r"|train\.(?:micro_batch|compile|activation_checkpointing)"
    r"|teacher\.(?:domains\.[^.]*\.)?(?:deepspeed|micro_batch|rows_per_shard))$"
)


# Settings that choose among the scored tokens, or what becomes of the chosen ones.
_SELECTION = {
    *("threshold", "metric", "quantile", "least", "most", "probability"),
    *("keep", "random", "replacement", "sampler", "refresh", "draws"),
}


def differences(a: Run, b: Run, *, selection: bool = True) -> list[str]:
    """Settings in which two runs differ so that their results differ: ``name: a's value, now b's``.

    Folders, geometry (``deepspeed``, micro-batches, ``compile``, activation checkpointing), the
    last stage and the cadence of logs, checkpoints and evaluations are free.

    Args:
        a: a run.
        b: another.
        selection: whether what selects among the tokens of a masking of hard tokens counts, or
            only what their store depends on.
    """
    old, new = a.model_dump(mode="json"), b.model_dump(mode="json")
    if not selection and isinstance(b.data.masking, HardTokens):
        # Where masked tokens are scored, the probability is the share of each pass.
        scored = {"probability"} if b.data.masking.shown == "mask" else set()
        for masking in (old["data"]["masking"], new["data"]["masking"]):
            for name in masking.keys() & _SELECTION - scored:
                del masking[name]
    return list(_changes(old, new, ""))


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    if _WITHOUT_EFFECT.match(name) or old == new:
        return
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        for key in old | new:
            inner = f"{name}.{key}" if name else key
            yield from _changes(old.get(key), new.get(key), inner)
    else:
        yield f"{name}: {show(_kind_or_value(old))}, now {show(_kind_or_value(new))}"


def _kind_or_value(value: Any) -> Any:
    return value.get("kind", value) if isinstance(value, dict) else value
