"""A method from outside dskd that goes through every seam; ``tests/methods/test_outside.py``.

Causal language modelling that counts a label for more, the more surprising it was to the student
before training (a stage fills a store with the labels' NLL, a reader adds it to the batches), and
that does not unlearn its first rows: before every step the gradient r of their plain loss is
probed, and a step's gradient g that has too little of it gets more, until the cosine of both is
``margin`` before it is clipped (at 0: A-GEM, Chaudhry et al. 2019, eq. 11). The checkpoint of the
highest accuracy is exported.
"""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from dskd.batch import Batch, Positions, Signal, Term
from dskd.data.loader import make_batch
from dskd.data.prepared import RowBatch
from dskd.data.views import Reader, Shown
from dskd.engine.checkpoints import Selection
from dskd.engine.hooks import Probe, StepHooks
from dskd.engine.shards import ParameterShards
from dskd.engine.stage import Stage, StageContext
from dskd.methods.base import Method
from dskd.methods.metrics import LM_LOSS, Metric
from dskd.models.families import positions_of
from dskd.models.frozen import frozen_model
from dskd.ops import positions_ce
from dskd.settings.folders import RunFolder
from dskd.settings.teachers import LiveTeacher
from dskd.stores.fill import Words, fill
from dskd.stores.fingerprints import prints_of_rows
from dskd.stores.shard import Column, StoreSpec
from dskd.stores.store import Store
from dskd.stores.sweep import Scored
from dskd.system import dist

KIND = "surprise"
SURPRISE = "surprise_N"
"""Column of a batch: the label's NLL before training, float32 [N], nats."""


def plain_loss(
    positions: Positions, signal: Signal | None, batch: Batch, step: int
) -> dict[str, Term]:
    """Cross entropy with the labels, each counting the same."""
    del signal, batch, step
    return {"memory": Term(positions_ce(positions).total, {})}


def _accuracy_sums(positions: Positions, batch: Batch) -> Tensor:
    del batch
    right_N = positions.logits_NV.argmax(1) == positions.labels_N
    return torch.stack([right_N.sum(), right_N.new_tensor(len(right_N), dtype=int)]).double()


ACCURACY = Metric(_accuracy_sums, lambda sums: {"accuracy": sums[0] / sums[1]})


class MyMethod(Method):
    """Language modelling by surprise, without unlearning some rows."""

    kind: str
    memory_rows: int = Field(4, ge=1)
    """Training rows, the first ones, that are not to be unlearnt; a multiple of the ranks."""
    margin: float = Field(0.0, ge=0, lt=1)
    """Least ``g.r / (|g| |r|)`` for the norms before the edit."""
    weight: float = Field(0.1, ge=0)
    """A label counts ``1 + weight * surprise``."""

    def columns(self) -> frozenset[str]:
        """The surprise."""
        return frozenset({SURPRISE})

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        """Weighted cross entropy, summed over the supervised positions."""
        del signal, step
        losses = positions_ce(positions, self._weights(batch))
        return {"tokens": Term(losses.total, {"ce": losses.label_N.sum()})}

    def counts(self, batch: Batch) -> dict[str, float]:
        """The sum of the weights."""
        return {"tokens": self._weights(batch).double().sum().item()}

    def _weights(self, batch: Batch) -> Tensor:
        return 1.0 + self.weight * batch.columns[SURPRISE]

    def stages(self) -> Sequence[Stage]:
        """``surprise``: score the labels by the student as it starts."""
        return (Stage(KIND, score, before="train", leaves=(KIND,), report=section),)

    def readers(self, context: StageContext) -> Sequence[Reader]:
        """What adds the surprise, to the batches of training."""
        return (_Surprise(context),)

    def hooks(self, student: PreTrainedModel, context: StageContext) -> StepHooks:
        """Keeps the step from unlearning the first rows."""
        del student
        return Rehearsal(context, self.memory_rows, self.margin)

    def metrics(self, context: StageContext) -> tuple[Metric, ...]:
        """The loss, and how often the label is the likeliest token."""
        del context
        return (LM_LOSS, ACCURACY)

    def selection(self) -> Selection:
        """The highest accuracy."""
        return Selection("eval_accuracy", higher_is_better=True)


def folder_of(context: StageContext) -> Path:
    """The store of a run."""
    return context.folder.path / KIND


def score(context: StageContext) -> None:
    """Fill the store, or do nothing if it is complete (collective)."""
    run, prepared = context.run, context.prepared
    spec = StoreSpec(
        kind=KIND,
        columns={"nll": Column("float32")},
        rows=len(prepared.train),
        draws=1,
        rows_per_shard=64,
        fingerprints=prints_of_rows(run, prepared),
        settings={},
    )

    def forward() -> Callable[[Batch], Tensor]:
        frozen = LiveTeacher(model=run.model, precision=run.train.precision)
        model = frozen_model(run, frozen, run.model, "model", prepared, context.device).eval()
        return lambda batch: positions_ce(positions_of(model, batch)).label_N

    def values(batch: Batch, nll_N: Tensor) -> Scored:
        return Scored(batch.counts_B.numpy(), {"nll": nll_N.float().numpy()})

    fill(
        folder_of(context),
        spec,
        prepared.train,
        context.view,
        forward,
        values,
        micro_batch=8,
        device=context.device,
        words=Words(KIND, "scoring labels", lambda folder: "the NLL of every label"),
    )


class _Surprise:
    """Reads the store; opened when the first batch is made."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._store: Store | None = None

    def __call__(self, rows: RowBatch, shown: Shown) -> Mapping[str, np.ndarray]:
        if self._store is None:
            prints = prints_of_rows(self._context.run, self._context.prepared)
            self._store = Store(folder_of(self._context), kind=KIND, expect=prints)
        _, columns = self._store.read(rows.ids_B, np.zeros_like(rows.ids_B), ["nll"])
        return {SURPRISE: columns["nll"]}


class Rehearsal(StepHooks):
    """Edits a step's gradient so that it lowers the loss of some rows, too."""

    def __init__(self, context: StageContext, rows: int, margin: float) -> None:
        own = np.arange(rows, dtype=np.int64)[dist.rank() :: dist.world()]
        seen = (own, np.zeros_like(own))
        self._memory = [make_batch(context.prepared.train, context.view, *seen)]
        self._replicated = context.run.deepspeed == "zero0"  # every rank holds all of it
        self._margin = margin
        self._gradient: dict[str, Tensor] = {}
        self._cosine = 0.0
        self._projected = 0

    def before_passes(self, probe: Probe, step: int) -> None:
        """Remember the gradient of the memory's plain loss."""
        del step
        found = probe(self._memory, plain_loss, lambda batch: {"memory": float(batch.supervised)})
        self._gradient = {shard.name: shard.gradient.clone() for shard in found.shards()}

    def before_step(self, weights: ParameterShards, step: int, lr: float) -> None:
        """Project the gradient, if it has too little of the remembered one."""
        del step, lr
        shards = list(weights.shards())
        products = torch.zeros(3, dtype=torch.float64)
        for shard in shards:
            now, memory = shard.gradient.double(), self._gradient[shard.name].double()
            products += torch.stack([now @ memory, memory @ memory, now @ now])
        if not self._replicated:
            products = dist.sum_over_ranks(products)
        dot, memory, now = products.tolist()
        self._cosine = dot / (memory * now) ** 0.5
        if self._cosine < self._margin:
            self._projected += 1
            wanted = self._margin * (memory * now) ** 0.5
            for shard in shards:
                shard.gradient.add_(self._gradient[shard.name], alpha=(wanted - dot) / memory)

    def rates(self) -> dict[str, float]:
        """``cosine`` of both gradients, and how many steps were projected so far."""
        return {"cosine": self._cosine, "projected": self._projected}

    def state(self) -> dict[str, Any]:
        """The number of projected steps."""
        return {"projected": self._projected}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._projected = state["projected"]


def section(runs: Mapping[str, RunFolder]) -> str:
    """Names the runs that have a store of surprise."""
    scored = [name for name, folder in runs.items() if (folder.path / KIND).exists()]
    return f"<h2>Surprise</h2><p>{html.escape(', '.join(scored))}</p>"


def main(words: Sequence[str]) -> int:
    """``dskd my_package.my_file:main RUN``: print how many steps were projected."""
    lines = (Path(words[0]) / "train/metrics.jsonl").read_text().splitlines()
    print(int(max(json.loads(line).get("projected", 0) for line in lines)))
    return 0
