"""How much a task depends on each weight, measured on the trained model when the task is over.

Elastic Weight Consolidation (Kirkpatrick et al. 2017) takes the squares of the loss's gradients,
the diagonal of the empirical Fisher information; Memory Aware Synapses (Aljundi et al. 2018) the
absolute values of the gradients of the outputs' squared norm, which needs no labels.

Every rank has a whole copy of the model and takes every n-th group of rows, whose gradient is
measured and forgotten; the sums are added up over the ranks once, in the end. Nothing is kept of a
sweep that was interrupted: it is done again as a whole. The model is in eval mode, without dropout,
which the original leaves on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dskd.batch import Batch, Loss, LossCounts, Positions, Signal, Term, logit_map
from dskd.data.prefetch import send
from dskd.errors import NonFiniteError
from dskd.models.families import positions_of
from dskd.models.frozen import evaluating
from dskd.system import dist
from dskd.system.doing import next_one, pause

PROMPT = "prompt"
"""The term of Memory Aware Synapses."""

Measure = Literal["square", "absolute"]
"""What of an entry of a gradient is summed: its square (EWC) or its absolute value (MAS)."""


@dataclass(frozen=True, kw_only=True)
class ImportanceSweep:
    """Which rows are looked at, and how.

    Attributes:
        rows_M: ids of the rows, in the order in which they are grouped.
        make: the batch, on the CPU, of some of them.
        measure: of the gradients.
        group: rows whose mean loss is differentiated at once. 1: a Fisher information of single
            examples. As many as a step's: the original's, which is no estimate of it but scales
            alike, for it squares a mean, divided once more by the number of its rows.
        micro_batch: rows of a forward pass, at most.
        device: where the model is.
    """

    rows_M: NDArray[np.int64]
    make: Callable[[NDArray[np.int64]], Batch]
    measure: Measure
    group: int
    micro_batch: int
    device: torch.device

    def __call__(
        self,
        model: nn.Module,
        terms: Callable[[Batch], Mapping[str, Term]],
        counts: LossCounts,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """The importance of every trained parameter: fp32 on the CPU, in its shape, the same on
        every rank (collective).

        Of groups b of n_b rows, n rows in all: ``1/n sum_b m(d loss_b / n_b)``, m the measure. So
        with ``group`` 1 it is the mean over the rows.

        Args:
            model: a whole copy on this rank, without sharding.
            terms: of a batch on the device (:func:`terms_of`).
            counts: what the terms of a group are divided by, once added up over it.
            progress: called after each group with the number of those done and of all, of this
                rank.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; on every rank.
        """
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        sizes = [parameter.numel() for parameter in parameters.values()]
        flat = torch.zeros(sum(sizes), device=self.device)  # one, for one all-reduce
        sums = dict(zip(parameters, flat.split(sizes), strict=True))
        own = [*range(0, len(self.rows_M), self.group)][dist.rank() :: dist.world()]
        with evaluating(model):
            for done, begin in enumerate(own):
                rows = self.rows_M[begin : begin + self.group]
                self._differentiate(rows, terms, counts)
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        self._add(sums[name], parameter.grad.float().flatten(), len(rows))
                        parameter.grad = None
                if progress is not None:
                    progress(done + 1, len(own))
        pause()
        dist.sum_over_ranks(flat)
        flat /= len(self.rows_M)
        if not flat.isfinite().all():
            raise NonFiniteError("the importances of the weights are NaN or infinite")
        return {name: sums[name].cpu().view(p.shape) for name, p in parameters.items()}

    def _differentiate(
        self,
        rows: NDArray[np.int64],
        terms: Callable[[Batch], Mapping[str, Term]],
        counts: LossCounts,
    ) -> None:
        """Leave the gradient of the mean loss of a group with the parameters."""
        begins = range(0, len(rows), self.micro_batch)
        batches = [self.make(rows[begin : begin + self.micro_batch]) for begin in begins]
        parts = [counts(batch) for batch in batches]
        for batch in batches:
            found = terms(send(batch, self.device).on_device())
            # 1 where nothing counts, whose total is 0.
            totals = {name: sum(part[name] for part in parts) or 1.0 for name in found}
            losses = [term.total.double() / totals[name] for name, term in found.items()]
            torch.stack(losses).sum().backward()
            next_one()

    def _add(self, sums: Tensor, gradient: Tensor, rows: int) -> None:
        if self.measure == "square":
            sums.addcmul_(gradient, gradient, value=1 / rows**2)
        else:
            sums.add_(gradient.abs(), alpha=1 / rows)


def terms_of(model: nn.Module, loss: Loss) -> Callable[[Batch], Mapping[str, Term]]:
    """The terms of a loss that needs no teacher, on a whole model's supervised positions."""
    return lambda batch: loss(positions_of(model, batch), None, batch, 0)


def mean_square_probability(
    positions: Positions, signal: Signal | None, batch: Batch, step: int
) -> dict[str, Term]:
    """The function whose gradient Memory Aware Synapses measures, as the original has it for
    language: the mean square of the probabilities of the token that follows the prompt, over the
    vocabulary and the rows.

    It stands where the first supervised position of each row is, at the prompt's last token: a
    causal model knows nothing there of the answer. Labels play no part.
    """
    del signal, step
    # Rows without a supervised position have no prompt here, and no first one. The counts are on
    # the host, so no device is waited for.
    ends_B = batch.counts_B.cumsum(0)
    firsts_R = (ends_B - batch.counts_B)[batch.counts_B > 0]
    hidden_ND = positions.hidden_ND
    firsts_R = firsts_R.to(hidden_ND.device, non_blocking=True)
    projection = positions.projection
    logits_RV = logit_map(projection).of(projection(hidden_ND.index_select(0, firsts_R)))
    squares_RV = torch.softmax(logits_RV.float(), -1) ** 2
    return {PROMPT: Term(squares_RV.mean(-1).sum(), {})}


def prompts(batch: Batch) -> dict[str, float]:
    """What the term of :func:`mean_square_probability` is divided by: rows with a prompt."""
    return {PROMPT: float((batch.counts_B > 0).sum())}
