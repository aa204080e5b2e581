"""Tiny runs on two domains of text, for tests that train through the user's command."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dskd.data.sources import documents
from dskd.settings.data import BuiltinSource
from dskd.settings.yaml_tree import dump, merge
from dskd.system.log import read_metrics
from tests.launching import cut_back, evaluations, forked, losses

STEPS = 4
MASKED = {
    "model_type": "roberta",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CAUSAL = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
# Far from uniform, so that it matters which teacher a row has.
TEACHER = {"hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.3}
OTHER = {**TEACHER, "initializer_range": 0.6}
LIVE = {"kind": "live", "model": {"config": MASKED | TEACHER}}
LIVE_OTHER = {"kind": "live", "model": {"config": MASKED | OTHER}}
ALL_KEPT = {"kind": "cached", "k": 320, "values": "fp32", "rows_per_shard": 64}


def cached(live: dict[str, Any]) -> dict[str, Any]:
    """A cached teacher that keeps the whole distribution of a live one."""
    return live | ALL_KEPT


def routed(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """A teacher for each of the two domains."""
    return {"kind": "routed", "domains": {"left": left, "right": right}}


def write_corpora(folder: Path) -> None:
    """``left.txt``, ``right.txt`` and ``valid.txt`` from the built-in corpus, some 80 rows each."""
    found = documents(BuiltinSource(documents=36))
    for name in ("left", "right", "valid"):
        texts = (text.strip()[:500] for text in islice(found, 12))
        (folder / f"{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")


def source(folder: Path, name: str, domain: str | None = None) -> dict[str, str]:
    """The setting that reads one of the corpora, as a domain of its own name unless said."""
    return {"kind": "text", "path": str(folder / f"{name}.txt"), "domain": domain or name}


def settings(folder: Path) -> dict[str, Any]:
    """A run of KI by a live teacher, on both corpora of the folder."""
    return {
        "seed": 3,
        "deepspeed": "zero0",
        "data": {
            "folder": str(folder / "data"),
            "sources": [source(folder, "left"), source(folder, "right")],
            "validation": [source(folder, "valid")],
            "tokenizer": {"kind": "trained", "vocab_size": 320},
            "block_size": 32,
            "masking": {"draws": 2},
        },
        "model": {"config": MASKED},
        "teacher": LIVE,
        "method": {"kind": "ki", "temperature": 2.0, "schedule": "linear", "steps": STEPS},
        "train": {
            "steps": STEPS,
            "batch": 8,
            "micro_batch": 4,
            "lr": 0.01,
            "warmup": 1,
            "precision": "fp32",
        },
        "evaluation": {"every": 2, "rows": 4},
        "checkpoint": {"every": 2},
        "until": "train",
    }


def causal(student: dict[str, Any] = CAUSAL) -> dict[str, Any]:
    """What makes a run of :func:`settings` one of causal models."""
    return {
        "data": {"objective": "causal", "packing": "contiguous"},
        "model": {"config": student},
        "teacher": {"kind": "live", "model": {"config": CAUSAL | TEACHER}},
    }


def same(a: Path, b: Path) -> None:
    """Two runs have the same losses and evaluations."""
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    assert evaluations(a) == pytest.approx(evaluations(b), abs=1e-5)


def step_lines(run: Path) -> list[dict[str, Any]]:
    """What a run has logged of its steps, in order."""
    return [line for line in read_metrics(run / "train" / "metrics.jsonl") if "loss" in line]


class Runs:
    """Variations of the settings, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_corpora(folder)

    def run(self, name: str, ranks: int, *words: str, **changes: Any) -> Path:
        """Train the settings with ``changes`` of whole sections merged in; the run's folder."""
        tree = merge(settings(self.folder), changes)
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(dump(tree), encoding="utf-8")
        forked(ranks, str(recipe), f"out={self.folder / name}", *words)
        return self.folder / name

    def copied(self, run: Path, name: str, step: int | None = None) -> Path:
        """A copy of a run, cut back to a step if there is one."""
        out = self.folder / name
        shutil.copytree(run, out)
        if step is not None:
            cut_back(out, step)
        return out
