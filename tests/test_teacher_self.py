"""A student that teaches itself: as it is, as it started, or at the average of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from dskd.average import Average
from dskd.batch import IGNORE, Batch, Projected
from dskd.checks import validate
from dskd.config import Recipe, read
from dskd.errors import ConfigError
from dskd.log import read_metrics
from dskd.method import build_method
from dskd.objective import Objective
from dskd.plan import check
from dskd.shards import Weights
from dskd.teacher import Live, Own, Unmasked
from tests.equivalence.small import STEPS, Runs, causal
from tests.launching import cut_back, evaluations, losses

VOCABULARY, MASK = 23, 4


def student(dropout: float = 0.5, dtype: torch.dtype = torch.float64) -> BertForMaskedLM:
    """A BERT of two layers with three columns of padding, in train mode."""
    config = BertConfig(
        vocab_size=VOCABULARY + 3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.5,
    )
    torch.manual_seed(1)
    return BertForMaskedLM(config).to(dtype).train()


def masked_batch() -> tuple[Batch, Tensor]:
    """A batch with masked places, and its rows without masks."""
    torch.manual_seed(2)
    rows_BT = torch.randint(5, VOCABULARY, (4, 9))
    chosen_BT = torch.rand(rows_BT.shape) < 0.4
    ids_BT = torch.where(chosen_BT, MASK, rows_BT)
    labels_BT = torch.where(chosen_BT, rows_BT, IGNORE)
    assert 5 < chosen_BT.sum() < 30
    rows_B = torch.arange(4)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 7:] = 0
    labels_BT[1, 7:] = IGNORE
    batch = Batch(
        row_ids_B=rows_B, domains_B=rows_B, ids_BT=ids_BT, mask_BT=mask_BT, labels_BT=labels_BT
    )
    return batch, rows_BT


def plain_logits(model: torch.nn.Module, ids_BT: Tensor, batch: Batch) -> Tensor:
    """[N, V] of HuggingFace's own forward in eval mode, without gradient."""
    was = model.training
    with torch.no_grad():
        logits_BTV = model.eval()(input_ids=ids_BT, attention_mask=batch.mask_BT).logits
    model.train(was)
    return logits_BTV[batch.supervised_BT][:, :VOCABULARY]


def test_it_sees_what_the_masks_hide():
    model, (batch, rows_BT) = student(), masked_batch()
    signal = Unmasked(Own(model, VOCABULARY))(batch)
    assert isinstance(signal, Projected)
    expected_NV = plain_logits(model, rows_BT, batch)
    torch.testing.assert_close(signal.logits_NV, expected_NV, rtol=1e-12, atol=1e-12)
    assert not signal.hidden_NE.requires_grad
    seen_NV = Own(model, VOCABULARY)(batch).logits_NV
    torch.testing.assert_close(seen_NV, plain_logits(model, batch.ids_BT, batch))
    assert (seen_NV - expected_NV).abs().max() > 0.1


def test_a_causal_student_sees_its_row_as_it_is():
    """Its labels are the next tokens, which are no input in the place of the last."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).double().train()
    batch, rows_BT = masked_batch()
    labels_BT = torch.full_like(rows_BT, IGNORE)
    labels_BT[:, :-1] = rows_BT[:, 1:]
    batch = Batch(
        row_ids_B=batch.row_ids_B,
        domains_B=batch.domains_B,
        ids_BT=rows_BT,
        mask_BT=torch.ones_like(rows_BT),
        labels_BT=labels_BT,
    )
    found_NV = Own(model, VOCABULARY)(batch).logits_NV
    torch.testing.assert_close(found_NV, plain_logits(model, rows_BT, batch))


def test_modes_and_random_numbers_stay_as_they_were():
    model, (batch, _) = student(), masked_batch()
    model.bert.encoder.layer[1].eval()  # a mixture, as somebody may have frozen a part
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    before = torch.get_rng_state()
    Unmasked(Own(model, VOCABULARY))(batch)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_put_back_after_an_error():
    model, (batch, _) = student(), masked_batch()
    beyond = torch.full_like(batch.ids_BT, VOCABULARY + 9)
    broken = Batch(
        row_ids_B=batch.row_ids_B,
        domains_B=batch.domains_B,
        ids_BT=beyond,
        mask_BT=batch.mask_BT,
        labels_BT=batch.labels_BT,
    )
    with pytest.raises(IndexError):
        Own(model, VOCABULARY)(broken)
    assert all(module.training for module in model.modules())


def test_the_loss_of_the_paper_through_the_whole_model():
    """Loss and gradients of a student with dropout, against autograd on HuggingFace's logits."""
    model, (batch, rows_BT) = student(), masked_batch()
    teacher = Unmasked(Own(model, VOCABULARY))
    objective = Objective(model, build_method({"kind": "self_evolution"}), teacher)
    torch.manual_seed(3)
    loss, parts = objective(batch, 0)["tokens"]
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    reference_NV = plain_logits(model, rows_BT, batch).softmax(1)
    torch.manual_seed(3)  # the reference took no random numbers
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    logprobs_NV = logits_BTV[batch.supervised_BT].log_softmax(1)
    ce = -logprobs_NV.gather(1, batch.labels_N[:, None]).sum()
    kl = kl_div(logprobs_NV[:, :VOCABULARY], reference_NV, reduction="sum")
    (0.9 * ce + 0.1 * kl).backward()
    assert parts["ce"].item() == pytest.approx(ce.item(), rel=1e-9)
    assert parts["kl"].item() == pytest.approx(kl.item(), rel=1e-9)
    assert loss.item() == pytest.approx((0.9 * ce + 0.1 * kl).item(), rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-9, msg=name)


# ---- the average ---------------------------------------------------------------------------------


def weights_of(model: torch.nn.Module) -> Weights:
    parameters = dict(model.named_parameters())
    return Weights(parameters, torch.optim.SGD(parameters.values()), gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_average_moves_and_is_kept(tmp_path, dtype):
    """The closed form of three steps; the fp32 mean moves where a bf16 one would stand still."""
    model, replica = student(dtype=torch.float32), student(dtype=dtype)
    average = Average(replica, 0.99)
    Live(replica, VOCABULARY)  # freezes it, as the run does
    name = "bert.encoder.layer.0.output.dense.weight"
    weight = model.get_parameter(name)
    expected = replica.get_parameter(name).float().clone()
    for step in range(3):
        with torch.no_grad():
            weight.add_(0.01)
        average.after_step(weights_of(model), step, 0.1)
        expected = 0.99 * expected + 0.01 * weight.detach()
    found = replica.get_parameter(name)
    assert found.dtype == dtype
    rtol = 1e-6 if dtype == torch.float32 else 0.008
    torch.testing.assert_close(found, expected.to(dtype), rtol=rtol, atol=1e-7)
    average.save(tmp_path)
    stored = load_file(tmp_path / "average.safetensors")
    torch.testing.assert_close(stored[name], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(stored[name], student(dtype=torch.float32).get_parameter(name))
    fresh = student(dtype=dtype)
    again = Average(fresh, 0.99)
    again.load(tmp_path)
    for one in (average, again):
        one.after_step(weights_of(model), 3, 0.1)
    for key, value in replica.named_parameters():
        assert torch.equal(value, fresh.get_parameter(key)), key


# ---- what is refused -----------------------------------------------------------------------------

OWN = "method={kind: self_evolution}"


def problem(*words: str) -> str:
    recipe = read(None, [OWN, *words])
    methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
    with pytest.raises(ConfigError) as caught:
        check(recipe, methods, world=1)
    return str(caught.value)


def test_settings_of_the_frozen_copy_are_refused_elsewhere():
    for weights in ("current", "average"):
        teacher = f"teacher={{kind: self, weights: {weights}, deepspeed: zero3, precision: fp32}}"
        assert problem(teacher).splitlines() == [
            f"teacher.deepspeed: zero3 shards a frozen copy, but teacher.weights is {weights}",
            f"teacher.precision: is of a frozen copy; with teacher.weights {weights} it is the"
            " student's",
        ]
    wrong = "teacher={kind: self, weights: frozen, deepspeed: zero2}"
    assert "a teacher's must be 3" in problem(wrong)


def test_no_average_of_what_cannot_be_followed():
    sizes = "hidden_size: 32, every: 1, ramp: 2, anneal: 2"
    method = f"method={{kind: wid, {sizes}, inherit: {{steps: 5}}}}"
    average = "teacher={kind: self, weights: average}"
    assert problem(method, average).startswith("teacher.weights: average, but method wid makes")
    on_disk = problem(average, "deepspeed=zero3_nvme")
    assert on_disk.startswith("teacher.weights: average, but zero3_nvme keeps the weights")
    recipe: Recipe = read(None, [method, "teacher={kind: self, weights: frozen}"])
    run = recipe.runs["run"]
    check(recipe, {"run": build_method(run.method)}, world=1)
    validate(run, 2, build_method(run.method))


# ---- whole runs ----------------------------------------------------------------------------------

WEIGHTS = ("current", "frozen", "average")
STEEP = {"kind": "self_evolution", "smoothing": 0.5}


def train(runs: Runs, name: str, ranks: int, *words: str, weights: str, **changes: Any) -> Path:
    """A run of the tiny student that teaches itself, on random masks."""
    teacher = {"kind": "self", "weights": weights, "decay": 0.5}
    tree = {"teacher": teacher, "method": STEEP, "deepspeed": "zero0"}
    return runs.run(name, ranks, *words, **(changes | tree))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("self"))


@pytest.fixture(scope="module")
def references(runs) -> dict[str, Path]:
    """One rank, ZeRO-0, two micro-batches a step."""
    return {weights: train(runs, weights, 1, weights=weights) for weights in WEIGHTS}


def same(a: Path, b: Path) -> None:
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    assert evaluations(a) == pytest.approx(evaluations(b), abs=1e-5)
    assert column(a, "kl") == pytest.approx(column(b, "kl"), abs=1e-5)


def column(run: Path, term: str) -> list[float]:
    lines = read_metrics(run / "train" / "metrics.jsonl")
    return [line["terms"][term] for line in lines if "terms" in line]


def test_the_three_teachers_are_alike_at_first_only(references):
    """All start at the student's weights, and part as soon as a step has moved it."""
    kl = {weights: column(run, "kl") for weights, run in references.items()}
    assert kl["frozen"][0] == pytest.approx(kl["current"][0], abs=1e-6) and kl["frozen"][0] > 0
    assert kl["average"][0] == pytest.approx(kl["current"][0], abs=1e-6)
    last = [kl[weights][-1] for weights in WEIGHTS]
    apart = [abs(a - b) for a, b in zip(last, last[1:] + last[:1], strict=True)]
    assert min(apart) > 1e-4
    for run in references.values():
        lines = [x for x in read_metrics(run / "train" / "metrics.jsonl") if "terms" in x]
        for line in lines:
            terms = line["terms"]
            assert line["loss"] == pytest.approx(0.5 * terms["ce"] + 0.5 * terms["kl"], rel=1e-6)


GEOMETRIES = [
    ("current", 0, 2, 4),
    ("current", 2, 1, 8),
    ("current", 3, 2, 2),
    ("average", 0, 2, 2),
    ("average", 2, 2, 4),
    ("average", 3, 2, 2),
]


@pytest.mark.parametrize(("weights", "stage", "ranks", "micro"), GEOMETRIES)
def test_any_geometry_is_the_same_run(runs, references, weights, stage, ranks, micro):
    words = [f"deepspeed=zero{stage}", f"train.micro_batch={micro}"]
    name = f"{weights}-{stage}-{ranks}-{micro}"
    same(train(runs, name, ranks, *words, weights=weights), references[weights])


def test_a_sharded_frozen_copy_is_the_same(runs, references):
    words = ["teacher.deepspeed=zero3", "deepspeed=zero3", "train.micro_batch=4"]
    same(train(runs, "sharded", 2, *words, weights="frozen"), references["frozen"])


def test_activation_checkpointing_changes_nothing(runs, references):
    words = ["train.activation_checkpointing=true", "deepspeed=zero3"]
    same(train(runs, "recomputed", 2, *words, weights="current"), references["current"])


RESUMED = [
    ("average", (0, 1), (0, 1)),
    ("average", (3, 2), (3, 2)),
    ("average", (2, 2), (3, 1)),
    ("frozen", (0, 1), (2, 2)),
]


@pytest.mark.parametrize(("weights", "saved", "loaded"), RESUMED)
def test_goes_on_where_it_was(runs, references, weights, saved, loaded):
    """Bit for bit in the same geometry, to rounding in another."""
    name = "{}-{}-{}--{}-{}".format(weights, *saved, *loaded)
    stage, ranks = saved
    out = train(runs, name, ranks, f"deepspeed=zero{stage}", weights=weights)
    whole = losses(out), column(out, "kl")
    cut_back(out, step=2)
    stage, ranks = loaded
    train(runs, name, ranks, f"deepspeed=zero{stage}", weights=weights)
    same(out, references[weights])
    if saved == loaded:
        assert (losses(out), column(out, "kl")) == whole


@pytest.mark.parametrize("weights", WEIGHTS)
def test_causal_students(runs, weights):
    changes = {key: value for key, value in causal().items() if key != "teacher"}
    one = train(runs, f"causal-{weights}", 1, weights=weights, **changes)
    if weights == "current":
        words = ["deepspeed=zero3", "train.micro_batch=2"]
        same(train(runs, f"causal-{weights}-3", 2, *words, weights=weights, **changes), one)
    kl = column(one, "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # the same rows, no dropout
    assert (max(map(abs, kl)) < 1e-6) == (weights == "current")


def test_the_last_checkpoint_is_exported_whatever_its_loss(runs, references):
    """Of a run whose validation loss rises: its learning rate grows far too high."""
    out = train(
        runs,
        "rising",
        1,
        "until=evaluate",
        weights="current",
        train={"steps": STEPS, "lr": 3.0, "warmup": STEPS, "clip": 0.0},
        checkpoint={"keep": 1},
    )
    scores = evaluations(out)
    assert scores[-1] > scores[0]
    summary = json.loads((out / "train" / "summary.json").read_text())
    assert summary["best_step"] == STEPS
    assert summary["best_eval_nll"] == summary["eval_nll"] == scores[-1]
    kept = [path.name for path in (out / "train" / "checkpoints").iterdir()]
    assert kept == [f"step-{STEPS:08d}"]
    exported = json.loads((out / "scores.json").read_text())["eval_nll"]
    assert exported == pytest.approx(scores[-1], abs=1e-5)


def test_the_student_is_exported_and_not_its_average(runs, references):
    out = runs.folder / "exported"
    shutil.copytree(references["average"], out)
    train(runs, out.name, 2, "deepspeed=zero3", "until=evaluate", weights="average")
    scores = json.loads((out / "scores.json").read_text())
    assert scores["eval_nll"] == pytest.approx(evaluations(out)[-1], abs=1e-5)


def test_without_smoothing_it_is_language_modelling(runs):
    """The same losses bit for bit; no teacher is built."""
    tree = {"deepspeed": "zero0", "teacher": None}
    plain = runs.run("plain", 1, **tree, method={"kind": "lm"})
    own = runs.run("own", 1, **tree, method={"kind": "self_evolution", "smoothing": 0.0})
    assert losses(own) == losses(plain)
