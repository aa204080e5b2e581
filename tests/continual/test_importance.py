"""Importances of weights: the original's, a plain float64 model's, and read back piece by piece."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dskd.batch import IGNORE, Batch, Positions
from dskd.continual.importance import (
    ImportanceSweep,
    mean_square_probability,
    prompts,
    terms_of,
)
from dskd.continual.kept_weights import KeptWeights, keep_weights
from dskd.errors import NonFiniteError
from dskd.methods.lm import LanguageModelling
from tests.batches import batch_of
from tests.continual.cases import CASES
from tests.models.tiny import batch, loss_of, make
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CASE = CASES["importance_mas"]


class Bigram(nn.Module):
    """The model of the golden case: a token's logits are a product of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.tensor(CASE["inputs"]["E"], dtype=torch.float64))
        self.Wo = nn.Parameter(torch.tensor(CASE["inputs"]["Wo"], dtype=torch.float64))

    def positions(self, batch: Batch) -> Positions:
        """Its hidden states at the supervised positions."""
        ids_N = batch.ids_BT.flatten()[batch.positions_N]
        return Positions(self.E[ids_N], lambda hidden_ND: hidden_ND @ self.Wo, batch.labels_N)


def golden_rows() -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of the rows. The first label is at the prompt's last token; what stands
    behind it, and what the labels are, shall not matter."""
    rows = []
    for group in CASE["inputs"]["batches"]:
        for prompt, length, rest in zip(group["cq"], group["len_cq"], group["cqa"], strict=True):
            labels = [IGNORE] * (length - 1) + [1, 2] + [IGNORE] * (len(rest) - 1)
            rows.append((prompt[:length] + rest, labels))
    return rows


def golden_batch(rows: np.ndarray) -> Batch:
    """Some of the rows, padded with a token that is in none."""
    chosen = [golden_rows()[row] for row in rows.tolist()]
    width = max(len(ids) for ids, _ in chosen)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen])
    labels_BT = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in chosen])
    return batch_of(labels_BT, ids_BT=ids_BT)


def test_golden_importance_of_mas(tmp_path):
    """The original's groups have 2 and 3 rows, so each is a sweep here; and a second task."""
    how = {"make": golden_batch, "measure": "absolute", "group": 3, "micro_batch": 2, "device": CPU}
    terms = partial(mean_square_probability, signal=None, step=0)

    def importance(model):
        found = {}
        for rows_M in (np.arange(2), np.arange(2, 5)):
            sweep = ImportanceSweep(rows_M=rows_M, **how)
            omega = sweep(model, lambda batch: terms(model.positions(batch), batch=batch), prompts)
            for name, value in omega.items():
                found[name] = found.get(name, 0) + value * len(rows_M) / 5
        return found

    earlier = None
    for task, end in enumerate(["", "_after_second_identical_task"]):
        folder = tmp_path / str(task)
        keep_weights(folder, Bigram, importance, fingerprints={}, earlier=earlier)
        earlier = KeptWeights.of(folder, {})
        for name in ("E", "Wo"):
            wanted = torch.tensor(CASE["expected"][f"omega_{name}{end}"])
            torch.testing.assert_close(earlier.omega.whole(name), wanted, rtol=2e-6, atol=1e-10)


ROWS = 10
LM = LanguageModelling(kind="lm")


def rows_of(rows_M: np.ndarray) -> Batch:
    """Some of 10 rows; two of the lengths are as short as a prompt, and one row has no label."""
    halves = [batch(5, seed=seed) for seed in (1, 2)]
    fields = ("ids_BT", "mask_BT", "labels_BT")
    ids_BT, mask_BT, labels_BT = (torch.cat([getattr(h, f) for h in halves]) for f in fields)
    labels_BT[3] = IGNORE
    whole = batch_of(labels_BT, ids_BT=ids_BT, mask_BT=mask_BT)
    return whole.select(torch.from_numpy(rows_M))


def label_loss(model: nn.Module, data: Batch) -> Tensor:
    """The mean cross entropy of a group, as EWC differentiates it."""
    return loss_of(model, data) / max(data.supervised, 1)


def prompt_loss(model: nn.Module, data: Batch) -> Tensor:
    """The mean squared probability after each prompt, which alone the model sees."""
    losses = []
    for row in range(len(data.ids_BT)):
        if int(data.counts_B[row]):
            end = int((data.labels_BT[row] != IGNORE).nonzero()[0]) + 1
            logits_V = model(input_ids=data.ids_BT[row : row + 1, :end]).logits[0, -1]
            losses.append((torch.softmax(logits_V, -1) ** 2).mean())
    return sum(losses) / len(losses) if losses else 0.0 * sum(p.sum() for p in model.parameters())


def plain_importance(measure: str, group: int) -> dict[str, Tensor]:
    """``1/n sum_b m(d loss_b / n_b)`` in float64."""
    model = make("gpt2", initializer_range=0.2).double().eval()
    parameters = dict(model.named_parameters())
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for begin in range(0, ROWS, group):
        rows_M = np.arange(ROWS)[begin : begin + group]
        loss = (label_loss if measure == "square" else prompt_loss)(model, rows_of(rows_M))
        gradients = torch.autograd.grad(loss / len(rows_M), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            found[name] += gradient**2 if measure == "square" else gradient.abs()
    return {name: value / ROWS for name, value in found.items()}


def _swept(rank, measure, group, micro):
    """The importances, whether the model was left as it was, and the groups that were counted."""
    del rank
    model = make("gpt2", initializer_range=0.2)  # with dropout, unless in eval mode
    how = {"make": rows_of, "measure": measure, "group": group, "micro_batch": micro, "device": CPU}
    loss = LM.loss if measure == "square" else mean_square_probability
    done: list[tuple[int, int]] = []
    sweep = ImportanceSweep(rows_M=np.arange(ROWS), **how)
    omega = sweep(
        model,
        terms_of(model, loss),
        LM.counts if measure == "square" else prompts,
        lambda *numbers: done.append(numbers),
    )
    untouched = model.training and all(p.grad is None for p in model.parameters())
    return {name: value.tolist() for name, value in omega.items()}, untouched, done


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("group", "micro"), [(1, 1), (3, 2), (4, 8)])
@pytest.mark.parametrize("measure", ["square", "absolute"])
def test_importances_are_those_of_a_plain_model(measure, group, micro, world):
    expected = plain_importance(measure, group)
    whole = torch.cat([value.flatten() for value in expected.values()])
    results = run_ranks(_swept, measure, group, micro, world=world)
    for rank, (omega, untouched, done) in enumerate(results):
        assert omega == results[0][0]
        assert untouched
        groups = len(range(0, ROWS, group)[rank::world])
        assert done == [(n + 1, groups) for n in range(groups)]
    found = torch.cat([torch.tensor(results[0][0][name]).flatten() for name in expected])
    difference = (found.double() - whole).norm() / whole.norm()
    assert difference < 2e-6


def test_an_importance_that_is_not_finite_is_refused():
    model = make("gpt2")
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    how = {"measure": "square", "group": 5, "micro_batch": 5, "device": CPU}
    sweep = ImportanceSweep(rows_M=np.arange(ROWS), make=rows_of, **how)
    with pytest.raises(NonFiniteError, match="importances of the weights are NaN or infinite"):
        sweep(model, terms_of(model, LM.loss), LM.counts)
