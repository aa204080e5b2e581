"""What the model card of a run's export tells of the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dskd.engine.checkpoints import Saved
from dskd.runs.context import RunContext
from dskd.settings.run import Run

_TOKENIZER = (
    "It reads the names of special tokens in a text as text, as it did in training; where they are "
    "meant (`the <mask> mill`), call it with `split_special_tokens=False`."
)


def card_of(context: RunContext, best: Saved) -> dict[str, Any]:
    """The card of the model of the checkpoint ``best``, value by heading (collective where the rows
    are first used)."""
    run, score = context.run, best.score
    classifier = context.prepared.classes is not None
    return {
        "title": f"A {'classifier' if classifier else 'language model'} trained with dskd",
        "method": as_shared(dict(run.method), run),
        "step": best.step,
        context.scored.metric: None if score is None else score.value,
        "tokenizer": _TOKENIZER,
        "run": as_shared(run.model_dump(mode="json"), run),
    }


def as_shared(value: Any, run: Run) -> Any:
    """Settings as others may read them: an absolute path tells about this machine and its users
    what nobody who is given the model can use. What lies beside the run's folder is named from
    there (``teacher/export``), what lies elsewhere by its own name."""
    if isinstance(value, dict):
        return {key: as_shared(inner, run) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_shared(inner, run) for inner in value]
    if not (isinstance(value, str) and os.path.isabs(value)):
        return value
    path, beside = Path(value), run.out.absolute().parent
    return str(path.relative_to(beside)) if path.is_relative_to(beside) else path.name or value
