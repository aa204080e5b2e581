"""Metrics on named sets: the numbers of a plain model, for any number of ranks."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dskd.batch import IGNORE, Batch, Positions
from dskd.data.loader import make_batch
from dskd.data.views import Shown
from dskd.errors import ConfigError, DataError
from dskd.methods.lm import LanguageModelling
from dskd.methods.metrics import LM_LOSS, Metric, RowScores, ValueMetric
from dskd.models.families import positions_of
from dskd.training.evaluation import EvaluationSet, by_key, evaluate
from dskd.training.objective import Objective
from tests.data.row_batches import PlainRows
from tests.models.tiny import BLOCK, make
from tests.ranks import run_ranks

METHOD = LanguageModelling(kind="lm")
CPU = torch.device("cpu")


def rowset(count: int, seed: int) -> PlainRows:
    """Random rows of different lengths."""
    random = np.random.default_rng(seed)
    return PlainRows(random.integers(5, 43, (count, BLOCK)), random.integers(4, BLOCK, count))


def third(rows):
    """Every third token is predicted."""
    assert not rows.epochs_B.any()
    ids_BT, places_T = rows.tokens_BT, np.arange(BLOCK)
    chosen_BT = (places_T < rows.lengths_B[:, None]) & (places_T % 3 == 1)
    return Shown(np.where(chosen_BT, 4, ids_BT), np.where(chosen_BT, ids_BT, IGNORE))


def none(rows):
    return Shown(rows.tokens_BT, np.full_like(rows.tokens_BT, IGNORE))


def accuracy_sums(rows: Positions, batch: Batch) -> Tensor:
    right_N = rows.logits_NV.argmax(1) == rows.labels_N
    assert len(right_N) == int(batch.supervised_BT.sum())
    return torch.stack([right_N.double().sum(), torch.tensor(float(len(right_N))).double()])


def accuracy_results(sums: Sequence[float]) -> dict[str, float]:
    return {"accuracy": sums[0] / sums[1]}


ACCURACY = Metric(accuracy_sums, accuracy_results)


def sets() -> list[EvaluationSet]:
    other = EvaluationSet("other", rowset(9, 2), third, limit=4)
    return [EvaluationSet("eval", rowset(11, 1), third), other]


def _evaluated(rank: int) -> dict[str, float]:
    objective = Objective(make("bert").train(), METHOD, None)
    found = evaluate(objective, sets(), [LM_LOSS, ACCURACY], micro_batch=2, device=CPU)
    assert objective.training and objective.student.training  # the modes are put back
    return by_key(found)


def plain(each: EvaluationSet, row_ids: list[int]) -> tuple[float, float, int]:
    """NLL, share of right tokens and number of tokens, by HuggingFace's forward."""
    model = make("bert").eval()
    ids = np.array(row_ids)
    batch = make_batch(each.rows, each.view, ids, ids * 0)
    with torch.no_grad():
        logits_NV = positions_of(model, batch).logits_NV
    nll = torch.nn.functional.cross_entropy(logits_NV, batch.labels_N)
    right = (logits_NV.argmax(1) == batch.labels_N).double().mean()
    return nll.item(), right.item(), len(batch.labels_N)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_metrics_of_each_set_by_name(world):
    """Two metrics on two sets, of which one takes some rows; ranks with and without rows."""
    eval_set, other = sets()
    wanted = {"eval": plain(eval_set, list(range(11))), "other": plain(other, [0, 2, 4, 6])}
    for found in run_ranks(_evaluated, world=world):
        keys = ("nll", "bits", "ppl", "tokens", "accuracy")
        assert list(found) == [f"{name}_{key}" for name in ("eval", "other") for key in keys]
        for name, (nll, right, tokens) in wanted.items():
            assert found[f"{name}_nll"] == pytest.approx(nll, rel=1e-6)
            assert found[f"{name}_bits"] == pytest.approx(nll / math.log(2), rel=1e-6)
            assert found[f"{name}_ppl"] == pytest.approx(math.exp(nll), rel=1e-5)
            assert found[f"{name}_accuracy"] == pytest.approx(right)
            assert found[f"{name}_tokens"] == tokens


def kept(positions: Positions, batch: Batch) -> Tensor:
    rows_N = batch.row_ids_B.repeat_interleave(batch.counts_B)
    return torch.stack([rows_N.double(), positions.labels_N.double()], dim=1)


def _kept(rank: int) -> list[tuple[list, float]]:
    """All that a metric is given of a set, and another one beside it."""
    objective, given = Objective(make("bert"), METHOD, None), []
    keeps = ValueMetric(kept, lambda values: given.append(values.tolist()) or {})
    (each, _) = sets()
    for metrics in ([keeps], [LM_LOSS, keeps]):
        found = evaluate(objective, [each], metrics, micro_batch=2, device=CPU)
    return [(values, found["eval"]["tokens"]) for values in given]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_of_all_positions_come_once_in_the_order_of_the_rows(world):
    """For any number of ranks, of which one may repeat a row that does not count."""
    each = sets()[0]
    ids = np.arange(len(each.rows))
    batch = make_batch(each.rows, each.view, ids, ids * 0)
    rows = np.repeat(ids, batch.counts_B)
    wanted = np.stack([rows, batch.labels_N.numpy()], axis=1).astype(float).tolist()
    for found in run_ranks(_kept, world=world):
        assert found == [(wanted, len(wanted))] * 2


def test_rows_without_a_predicted_token_are_refused():
    objective = Objective(make("bert"), METHOD, None)
    with pytest.raises(DataError, match="no token of the 5 validation rows is predicted"):
        without = [EvaluationSet("eval", rowset(5, 1), none)]
        evaluate(objective, without, [LM_LOSS], micro_batch=2, device=CPU)


def test_results_of_one_name_are_refused():
    assert by_key({"a": {"em": 1.0}, "a_b": {"em": 2.0}}) == {"a_em": 1.0, "a_b_em": 2.0}
    with pytest.raises(ConfigError, match=r"^evaluation\.sets\.a_b: two results are called a_b_em"):
        by_key({"a": {"b_em": 1.0}, "a_b": {"em": 2.0}})


# ---- by domain -----------------------------------------------------------------------------------


def of_domains() -> EvaluationSet:
    """13 rows, each of another domain than the next; one of the four names has no row."""
    random, shape = np.random.default_rng(3), (13, BLOCK)
    rows = PlainRows(random.integers(5, 43, shape), random.integers(4, BLOCK, 13), domains=3)
    return EvaluationSet("eval", rows, third, domains=["a", "b", "c", "d"])


def _by_domain(rank: int, micro_batch: int) -> tuple[dict[str, dict[str, float]], list]:
    objective, given = Objective(make("bert"), METHOD, None), []
    keeps = ValueMetric(kept, lambda values: given.append(values[:, 0].tolist()) or {})
    metrics = [LM_LOSS, keeps, ACCURACY]
    found = evaluate(objective, [of_domains()], metrics, micro_batch=micro_batch, device=CPU)
    return found, given


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 3), (1, 16), (2, 2), (3, 4)])
def test_results_of_each_domain_are_those_of_its_rows(world, micro_batch):
    """In one pass, for any number of ranks and micro-batch; all domains' sums are the total's."""
    each = of_domains()
    for found, given in run_ranks(_by_domain, micro_batch, world=world):
        assert list(found) == ["eval", "eval.a", "eval.b", "eval.c"]
        assert [row for n, row in enumerate(given[0]) if row != given[0][n - 1]] == [*range(13)]
        for domain, name in enumerate("abc"):
            own, rows = found[f"eval.{name}"], list(range(domain, 13, 3))
            nll, right, tokens = plain(each, rows)
            assert own["nll"] == pytest.approx(nll, rel=1e-6)
            assert own["ppl"] == pytest.approx(math.exp(nll), rel=1e-5)
            assert own["accuracy"] == pytest.approx(right, rel=1e-12)
            assert (own["tokens"], own["rows"]) == (tokens, len(rows))
            assert sorted(set(given[domain + 1])) == rows and len(given[domain + 1]) == tokens
        whole, parts = found["eval"], [found[f"eval.{name}"] for name in "abc"]
        assert whole["tokens"] == sum(part["tokens"] for part in parts)
        for name in ("nll", "accuracy"):
            weighed = math.fsum(part[name] * part["tokens"] for part in parts)
            assert weighed / whole["tokens"] == pytest.approx(whole[name], rel=1e-12)


def test_a_domain_of_which_nothing_is_predicted_has_no_results():
    def but_b(rows):
        shown = third(rows)
        shown.labels_BT[rows.domains_B == 1] = IGNORE
        return shown

    objective, each = Objective(make("bert"), METHOD, None), replace(of_domains(), view=but_b)
    found = evaluate(objective, [each], [LM_LOSS], micro_batch=4, device=CPU)
    assert list(found) == ["eval", "eval.a", "eval.c"]
    first = evaluate(objective, [replace(each, limit=1)], [LM_LOSS], micro_batch=4, device=CPU)
    assert list(first) == ["eval"]  # all rows that are used are of one domain


def test_further_metrics_of_a_set_see_all_rows_once():
    seen = []
    count = ValueMetric(kept, lambda values: seen.append(len(values)) or {})
    objective, each = Objective(make("bert"), METHOD, None), replace(of_domains(), further=[count])
    found = evaluate(objective, [each], [LM_LOSS], micro_batch=4, device=CPU)
    assert seen == [found["eval"]["tokens"]] and len(found) == 4


def _labelled(values: list[list[float]]) -> dict[str, dict[str, float]]:
    """What rows with these labels and so on come to, row r of domain r % 2."""
    rows = RowScores(metric="accuracy").row_metric({})

    def numbers(positions: Positions, batch: Batch) -> Tensor:
        return torch.tensor(values).double()[batch.row_ids_B.repeat_interleave(batch.counts_B)]

    def first(rows):
        labels_BT = np.full_like(rows.tokens_BT, IGNORE)
        labels_BT[:, 0] = 5
        return Shown(rows.tokens_BT, labels_BT)

    random, shape = np.random.default_rng(3), (len(values), BLOCK)
    data = PlainRows(random.integers(5, 43, shape), np.full(len(values), 9), domains=2)
    each = EvaluationSet("eval", data, first, domains=["a", "b"])
    objective = Objective(make("bert"), METHOD, None)
    metrics = [replace(rows, values=numbers)]
    return evaluate(objective, [each], metrics, micro_batch=3, device=CPU)


def test_scores_of_labelled_rows_by_domain():
    """Label, prediction, confidence and loss of each row; a domain without labels has none."""
    right, wrong, unlabelled = [1, 1, 0.9, 0.1], [1, 0, 0.6, 0.8], [math.nan, 1, 0.5, math.nan]
    found = _labelled([right, wrong, right, right, wrong])
    assert found["eval"] == {"loss": pytest.approx(0.38), "accuracy": 0.6}
    assert found["eval.a"] == pytest.approx({"loss": 1 / 3, "accuracy": 2 / 3, "rows": 3})
    assert found["eval.b"] == pytest.approx({"loss": 0.45, "accuracy": 0.5, "rows": 2})
    found = _labelled([right, unlabelled, wrong, unlabelled])
    assert found["eval.a"]["accuracy"] == 0.5 and found["eval.b"] == {"rows": 2}
    with pytest.raises(DataError, match="none of the validation rows has a label"):
        _labelled([unlabelled, unlabelled])
