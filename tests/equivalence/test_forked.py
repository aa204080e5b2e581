"""One trajectory whatever the teacher's form, the family and the options, in forked ranks.

Each test trains a tiny student for a few steps with the user's command, on two domains of text; the
losses of runs that must be the same agree to 1e-5 (fp32, no dropout unless said).
"""

import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

from dskd.batch import IGNORE
from dskd.data.loader import Loader
from dskd.data.prepared import open_prepared, prepare
from dskd.data.views import view_for
from dskd.models.build import build
from dskd.ops import triton_everywhere
from dskd.settings.model import Model
from dskd.settings.parsing import parse
from dskd.settings.run import Run
from dskd.teachers.teacher import FrozenTeacher
from tests.equivalence.small import (
    CAUSAL,
    LIVE,
    LIVE_OTHER,
    MASKED,
    STEPS,
    Runs,
    cached,
    causal,
    routed,
    same,
    settings,
    step_lines,
)
from tests.launching import evaluations, losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("forked"))


@pytest.fixture(scope="module")
def single(runs) -> Path:
    """One rank, ZeRO-0, one live teacher for all rows."""
    out = runs.run("single", 1)
    assert len(losses(out)) == STEPS
    assert learns(out)
    return out


@pytest.fixture(scope="module")
def mixed(runs) -> Path:
    """As ``single``, with another teacher for the second domain."""
    return runs.run("mixed", 1, teacher=routed(LIVE, LIVE_OTHER))


def learns(out: Path) -> bool:
    return evaluations(out)[-1] < evaluations(out)[0] - 0.02


def counted(owner, name: str, file: Path, monkeypatch) -> Path:
    """A file that grows by a letter with each call, of forked ranks as well: they inherit this."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        with file.open("a") as stream:
            stream.write("x")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return file


@pytest.mark.parametrize(
    ("teacher", "operation"), [(LIVE, "dense"), (cached(LIVE), "topk")], ids=["live", "cached"]
)
def test_the_kernels_train_like_the_closed_forms(runs, single, monkeypatch, teacher, operation):
    """In Triton's interpreter: every loss and gradient of the run, evaluations included."""
    kernels, name = import_module(f"dskd.kernels.{operation}"), f"{operation}_rows"
    launches = counted(kernels, name, runs.folder / f"launches-{operation}", monkeypatch)
    with triton_everywhere():
        same(runs.run(f"kernels-{teacher['kind']}", 1, teacher=teacher), single)
    # at the least, every step's
    assert len(launches.read_text()) >= STEPS


SHARDED = LIVE | {"deepspeed": "zero3"}


@pytest.mark.parametrize(
    ("name", "ranks", "teacher"),
    [
        ("live", 1, routed(LIVE, LIVE)),
        ("live", 2, routed(LIVE, LIVE)),
        ("sharded", 2, routed(SHARDED, SHARDED)),
        ("cached", 1, routed(cached(LIVE), cached(LIVE))),
    ],
)
def test_the_same_teacher_for_each_domain_is_one_teacher(runs, single, name, ranks, teacher):
    same(runs.run(f"routed-{name}-{ranks}", ranks, teacher=teacher), single)


@pytest.mark.parametrize(
    ("name", "teacher"),
    [
        ("sharded", routed(SHARDED, LIVE_OTHER | {"deepspeed": "zero3"})),
        ("cached", routed(cached(LIVE), cached(LIVE_OTHER))),
    ],
)
def test_two_teachers_in_any_form_are_the_same_two(runs, mixed, name, teacher):
    same(runs.run(f"mixed-{name}", 2, "deepspeed=zero2", teacher=teacher), mixed)


def test_each_row_is_taught_by_its_own_domains_teacher(runs, single, mixed):
    """The first step's loss, from the rows, the masks and plain HuggingFace models."""
    teachers = {"left": LIVE, "right": LIVE_OTHER}
    assert losses(mixed)[0] == pytest.approx(first_loss(runs.folder, teachers), abs=1e-5)
    assert losses(single)[0] == pytest.approx(
        first_loss(runs.folder, dict.fromkeys(teachers, LIVE)), abs=1e-5
    )
    assert abs(losses(mixed)[0] - losses(single)[0]) > 0.01


@torch.no_grad()
def first_loss(folder: Path, teachers: dict) -> float:
    """Mean of T^2 KL over the first batch, row by row; alpha is 1 and no weight has moved yet."""
    run = parse(Run, settings(folder), "")
    prepared = open_prepared(prepare(run.data))
    view = view_for(run.data, prepared.tokenizer, run.seed)
    loader = Loader(prepared.train, view, batch=8, micro_batch=8, rank=0, world=1, seed=run.seed)
    (sent,) = loader.next_step()
    batch = sent.batch
    loader.close()
    assert set(batch.domains_B.tolist()) == {0, 1}  # else this test could not tell

    def model(config: dict) -> torch.nn.Module:
        how = {"objective": "masked", "block_size": 32, "seed": run.seed, "dtype": torch.float32}
        tokenizer = prepared.tokenizer
        return build(Model(config=config), tokenizer, **how, ds=None, where="model").eval()

    student = model(MASKED)
    by_domain = {name: model(teacher["model"]["config"]) for name, teacher in teachers.items()}
    total, count = 0.0, 0
    for row, domain in enumerate(batch.domains_B.tolist()):
        ids_BT, mask_BT = batch.ids_BT[row : row + 1], batch.mask_BT[row : row + 1]
        where_T = batch.labels_BT[row] != IGNORE
        logits = [
            one(input_ids=ids_BT, attention_mask=mask_BT).logits[0, where_T].double() / 2.0
            for one in (by_domain[prepared.domains[domain]], student)
        ]
        teacher_NV, student_NV = (values.log_softmax(1) for values in logits)
        total += 4.0 * float((teacher_NV.exp() * (teacher_NV - student_NV)).sum())
        count += int(where_T.sum())
    return total / count


GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
QWEN2 = CAUSAL | {"model_type": "qwen2"}


def test_causal_cached_teacher_is_the_live_one(runs):
    """A Llama student with fewer key-value heads than heads."""
    live = runs.run("llama", 1, **causal())
    teacher = cached(causal()["teacher"])
    for ranks, ds in [(1, "zero0"), (2, "zero3")]:
        changes = causal() | {"teacher": teacher}
        out = runs.run(f"llama-cached-{ds}", ranks, f"deepspeed={ds}", **changes)
        same(out, live)
        assert (out / "cache" / "manifest.json").is_file()


@pytest.mark.parametrize("student", [GPT2, QWEN2], ids=lambda config: config["model_type"])
def test_causal_families_sharded(runs, student):
    name = student["model_type"]
    plain = runs.run(name, 1, **causal(student))
    assert learns(plain)
    same(runs.run(f"{name}-zero3", 2, "deepspeed=zero3", **causal(student)), plain)


DROPOUT = {"config": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}}


def test_activation_checkpointing_changes_nothing(runs, single):
    out = runs.run("recomputed", 1, "train.activation_checkpointing=true")
    assert losses(out) == pytest.approx(losses(single), abs=1e-6)


def test_activation_checkpointing_repeats_dropout(runs, single):
    """The recomputed forward drops what the first one dropped."""
    words = ["deepspeed=zero3", "train.micro_batch=2"]
    plain = runs.run("dropout", 2, *words, model=DROPOUT)
    words.append("train.activation_checkpointing=true")
    again = runs.run("dropout-recomputed", 2, *words, model=DROPOUT)
    assert losses(again) == pytest.approx(losses(plain), abs=1e-6)
    assert losses(plain) != pytest.approx(losses(single), abs=1e-3)  # there was dropout


@pytest.mark.parametrize("option", ["whole_word=true", "sampler=fairseq"])
def test_other_masks_train(runs, single, option):
    out = runs.run(option.partition("=")[0], 1, f"data.masking.{option}", "train.steps=6")
    assert len(losses(out)) == 6 and all(map(math.isfinite, losses(out)))
    assert learns(out)
    assert losses(out)[0] != pytest.approx(losses(single)[0], abs=1e-4)  # other masks


def test_the_teacher_rests_once_alpha_is_0(runs, monkeypatch):
    calls = counted(FrozenTeacher, "__call__", runs.folder / "calls", monkeypatch)
    lines = step_lines(runs.run("rest", 1, "method.steps=2"))
    assert ["kl" in line["terms"] for line in lines] == [True, True, False, False]
    assert ["alpha" in line and line["alpha"] > 0 for line in lines] == [True, True, False, False]
    assert all("ce" in line["terms"] for line in lines[2:])
    assert calls.read_text() == "x" * 4  # 2 micro-batches of each of the first 2 steps
