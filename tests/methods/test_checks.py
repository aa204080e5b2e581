"""Contradictions across settings, all told at once and by name."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dskd.engine.row_masks import masks_of
from dskd.errors import ConfigError
from dskd.hardness.masks import HARD_LABELS
from dskd.methods.base import Method, build_method
from dskd.methods.checks import validate
from dskd.settings.checks import problems_of
from dskd.settings.folders import cache_folder
from dskd.settings.recipe import dump_run, read

CACHED = "teacher={kind: cached, model: {config: {model_type: bert}}}"
ROUTED = "teacher={kind: routed, domains: {a: {kind: live}, b: {kind: live}}}"
SOURCES = "data.sources=[{kind: text, path: x, domain: a}, {kind: text, path: y, domain: b}]"


@dataclass
class _Method:
    """A method as the checks see it."""

    kind: str = "ki"
    temperature: float = 2.0
    temperature_setting: str = "temperature"
    objectives: frozenset[str] = Method.objectives
    wants: bool = True
    weighs: bool = False
    selects: bool = True
    objectives: frozenset[str] = frozenset({"masked", "causal"})

    def wants_teacher(self):
        return self.wants

    def selection(self):
        return "eval_nll" if self.selects else None

    def columns(self):
        return frozenset({HARD_LABELS}) if self.weighs else frozenset()


def _run(*overrides):
    return read(None, overrides).runs["run"]


def _problems(*overrides, world=1, method=None, prefix=""):
    with pytest.raises(ConfigError) as caught:
        validate(_run(*overrides), method or _Method(), world=world, prefix=prefix)
    return str(caught.value).splitlines()


def test_the_toy_is_sound():
    run = _run()
    for world in (1, 2):
        validate(run, build_method(run.method), world=world)


def test_hard_tokens_that_are_sound():
    bounds, original = "least: 0, most: 0.3", "sampler: original, probability: 0.2"
    for more in ("", bounds, original, "refresh: 1, model: {path: x}"):
        validate(_run(f"data.masking={{kind: hard_tokens, {more}}}"), _Method(), world=1)


CAUSAL_HARD = ["data.objective=causal", "data.masking.kind=hard_tokens"]


def test_a_causal_model_needs_a_method_that_weighs_hard_tokens():
    settings = ["most=0.3", "metric=quantile", "refresh=1", "micro_batch=2", "draws=null"]
    run = _run(*CAUSAL_HARD, *(f"data.masking.{setting}" for setting in settings))
    validate(run, _Method(weighs=True), world=1)
    (line,) = _problems(*CAUSAL_HARD, method=_Method(kind="lm", wants=False))
    assert line.startswith("data.masking.kind: hard_tokens, but a causal LM has no masks, and")
    for kind, settings, weighs in (
        ("lm", {}, False),
        ("ki", {"schedule": "constant"}, False),
        ("self_evolution", {}, False),
        ("self_evolution", {"hard_weight": 0.5}, True),
    ):
        columns = {HARD_LABELS} if weighs else set()
        assert build_method({"kind": kind, **settings}).columns() == columns


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("shown", "mask"), ("sampler", "original"), ("replacement", "all_mask"), ("least", "0.0"),
        ("probability", "0.2"), ("keep", "0.0"), ("random", "0.2"),
    ],
)  # fmt: skip
def test_settings_of_masks_are_refused_of_a_causal_model(setting, value):
    masking = f"data.masking.{setting}={value}"
    assert _problems(*CAUSAL_HARD, masking, method=_Method(weighs=True)) == [
        f"data.masking.{setting}: {value}, but a causal LM has no masks; leave it out"
    ]


def test_a_causal_run_can_be_read_back(tmp_path):
    """Its config.yaml names all settings, those that play no part included."""
    run = _run(*CAUSAL_HARD)
    (tmp_path / "config.yaml").write_text(dump_run(run))
    validate(read(tmp_path / "config.yaml").runs["run"], _Method(weighs=True), world=1)


def test_a_cached_teacher_is_refused_with_hard_tokens_of_a_causal_model():
    words = [*CAUSAL_HARD, "teacher={kind: cached, path: somewhere}"]
    (line,) = _problems(*words, method=_Method(weighs=True))
    told = "teacher.kind: cached, but a causal LM is to weigh hard tokens; use a live teacher"
    assert line == told


@pytest.mark.parametrize("kind", ["ki", "self_evolution"])
def test_a_causal_model_is_not_taught_by_what_it_is(kind):
    words = ["data.objective=causal", "teacher.kind=self"]
    (line,) = _problems(*words, method=_Method(kind=kind))
    assert line.startswith("teacher.weights: current, but a causal LM always sees its rows")
    other = _Method(kind="lm", wants=False)  # takes any teacher, which it does not want
    validate(_run(*words), other, world=1)
    for weights in ("frozen", "average"):
        validate(_run(*words, f"teacher.weights={weights}"), _Method(kind=kind), world=1)
    validate(_run("teacher.kind=self"), _Method(kind=kind), world=1)


def test_checkpoints_without_evaluation_where_it_does_not_select():
    every = ["evaluation.every=4", "checkpoint.every=10"]
    hard = "data.masking.kind=hard_tokens"
    lm, evolution = (build_method({"kind": kind}) for kind in ("lm", "self_evolution"))
    for run, method, selects in (
        (_run(), lm, True),
        (_run(hard), lm, False),  # random masks say nothing of hard ones
        (_run(hard, "data.objective=causal"), lm, True),
        (_run(), evolution, False),
    ):
        assert (masks_of(run).selects and method.selection() is not None) == selects
    validate(_run(*every, hard), _Method(), world=1)
    validate(_run(*every), _Method(selects=False), world=1)


def test_where_nothing_selects_nothing_ends_the_training():
    """Whether by the settings, the method or the masks."""
    patient = "evaluation.patience=3"
    validate(_run(patient), _Method(), world=1)
    hard = "data.masking.kind=hard_tokens"
    for words, method in (
        (["evaluation.select=last"], _Method()), ([hard], _Method()), ([], _Method(selects=False))
    ):  # fmt: skip
        (line,) = _problems(patient, *words, method=method)
        assert line.startswith("evaluation.patience: 3, but no score selects a checkpoint here")
    # and then a checkpoint needs no evaluation
    validate(_run("evaluation.every=4", "evaluation.select=last"), _Method(), world=1)


@pytest.mark.parametrize("every", [4, "epoch"])
def test_checkpoints_come_with_evaluations_unless_said(every):
    run = _run(f"evaluation.every={every}")
    assert (run.checkpoint.every, run.saves_every) == (None, every)
    validate(run, _Method(), world=1)
    assert _run(f"evaluation.every={every}", "checkpoint.every=8").saves_every == 8


@pytest.mark.parametrize(
    ("checkpoint", "evaluation", "sound"),
    [("epoch", "epoch", True), ("epoch", 1, True), ("epoch", 5, False), (10, "epoch", False)],
)
def test_checkpoints_of_epochs_are_evaluated(checkpoint, evaluation, sound):
    every = [f"checkpoint.every={checkpoint}", f"evaluation.every={evaluation}"]
    if sound:
        validate(_run(*every), _Method(), world=1)
    else:
        (line,) = _problems(*every)
        told = f"checkpoint.every: {checkpoint} is not a multiple of evaluation.every {evaluation};"
        assert line.startswith(told)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.warmup=21"], "train.warmup: 21 is more than train.steps 20"),
        (["train.end_lr=1"], "train.end_lr: 1.0 is more than train.lr 0.001"),
        (["data.masking.keep=0.6", "data.masking.random=0.5"],
         "data.masking.keep: 0.6 and data.masking.random 0.5 together exceed 1"),
        (["data.masking.whole_word=true", "data.masking.sampler=fairseq"],
         "data.masking.whole_word: the fairseq sampler selects tokens, not words"),
        (["data.masking={kind: hard_tokens, least: 0.3}"],
         "data.masking.least: 0.3 is more than data.masking.most 0.15 (data.masking.probability,"
         " for want of data.masking.most)"),
        (["data.masking={kind: hard_tokens, least: 0.3, most: 0.2}"],
         "data.masking.least: 0.3 is more than data.masking.most 0.2"),
        (["data.masking={kind: hard_tokens, refresh: 1, draws: 2}"],
         "data.masking.draws: data.masking.refresh changes the masks, so they cannot repeat"),
        (["data.masking={kind: hard_tokens, sampler: original, metric: correctness}"],
         "data.masking.metric: correctness, but data.masking.sampler original knows only"
         " confidence"),
        (["data.masking={kind: hard_tokens, sampler: original, shown: mask}"],
         "data.masking.shown: mask, but data.masking.sampler original knows only token"),
        (["data.masking={kind: hard_tokens, sampler: original, most: 0.2}"],
         "data.masking.most: data.masking.sampler original has no bounds; leave it null"),
        (["data.masking={kind: hard_tokens, sampler: original, replacement: all_mask}"],
         "data.masking.replacement: all_mask, but data.masking.sampler original replaces in its"
         " own way"),
        (["data.masking={kind: hard_tokens, refresh: 2}",
          "teacher={kind: cached, path: somewhere}"],
         "data.masking.refresh: 2, but a cached teacher holds all masks beforehand; use a live one,"
         " or leave it null"),
        (["data.masking={kind: hard_tokens, model: {}}"],
         "data.masking.model.config.model_type: missing; name a model type to build at random,"
         " or set data.masking.model.path"),
        (["data.masking={kind: hard_tokens, keep: 0.6, random: 0.5}"],
         "data.masking.keep: 0.6 and data.masking.random 0.5 together exceed 1"),
        (["model={}"],
         "model.config.model_type: missing; name a model type to build at random, or set"
         " model.path"),
        (["teacher.model={}"],
         "teacher.model.config.model_type: missing; name a model type to build at random, or"
         " set teacher.model.path"),
        (["teacher=null"], "teacher: the method ki needs one"),
        ([CACHED], "data.masking.draws: missing; a cached teacher holds so many masks of each row"
         " (epoch e uses e % draws)"),
        ([CACHED, "teacher.temperatures=[1, 4]", "data.objective=causal"],
         "method.temperature: 2.0 is not in teacher.temperatures: 1.0, 4.0"),
        ([CACHED, "teacher.temperatures=[2, 2]", "data.masking.draws=3"],
         "teacher.temperatures: [2.0, 2.0] has one twice"),
        (["teacher={kind: cached}", "data.masking.draws=3"],
         "teacher.model: missing; name a model to capture from, or teacher.path"),
        (["evaluation.every=4", "checkpoint.every=10"],
         "checkpoint.every: 10 is not a multiple of evaluation.every 4; the best checkpoint is"
         " chosen by its evaluation"),
        ([CACHED, "teacher.k=8", "teacher.use_k=9", "data.masking.draws=3"],
         "teacher.use_k: 9 is more than teacher.k 8"),
        ([ROUTED, SOURCES, "teacher.domains.b.kind=cached", "teacher.domains.b.path=x",
          "data.masking.draws=1"],
         "teacher.domains: all must be live or all cached, but: a live, b cached"),
        ([SOURCES, "data.masking.draws=1", "teacher={kind: routed, domains:"
          " {a: {kind: cached, path: x}, b: {kind: cached, path: x}}}"],
         "teacher.domains.b.path: the same folder as that of 'a'"),
    ],
)  # fmt: skip
def test_a_contradiction(overrides, line):
    assert _problems(*overrides) == [line]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "line"),
    [
        (16, 8, 3,
         "16 is not a multiple of train.micro_batch 8 x 3 ranks = 24; the nearest that are: 24"),
        (20, 8, 1, "20 is not a multiple of train.micro_batch 8 x 1 rank = 8; the nearest"
         " that are: 16 or 24"),
    ],
)  # fmt: skip
def test_batch_geometry(batch, micro, world, line):
    overrides = [f"train.batch={batch}", f"train.micro_batch={micro}"]
    assert _problems(*overrides, world=world) == [f"train.batch: {line}"]


def test_domains_must_match():
    assert _problems(ROUTED, SOURCES.replace("domain: b", "domain: bb")) == [
        "teacher.domains.b: no source has this domain; did you mean 'bb'?",
        "teacher.domains: no teacher for the domain 'bb' of data.sources",
    ]
    validate(_run(ROUTED, SOURCES), _Method(), world=1)


def test_all_at_once_under_the_name_of_the_run():
    lines = _problems("train.warmup=30", "teacher=null", world=3, prefix="runs.student")
    assert [line.split(":")[0] for line in lines] == [
        "runs.student.train.batch",
        "runs.student.train.warmup",
        "runs.student.teacher",
    ]


def test_a_method_without_teacher_asks_nothing_of_it():
    validate(_run("teacher=null"), _Method(kind="lm", wants=False), world=1)
    validate(_run(CACHED), _Method(kind="lm", temperature=9.0, wants=False), world=1)
    assert not list(problems_of(_run(CACHED), world=1))


def test_more_may_be_used_of_a_cache_captured_elsewhere():
    overrides = ["teacher={kind: cached, path: x, use_k: 64}", "data.masking.draws=1"]
    validate(_run(*overrides), _Method(), world=1)


def test_cache_folders():
    assert cache_folder(_run(CACHED, "out=o")) == Path("o/cache")
    assert cache_folder(_run(CACHED, "teacher.path=p")) == Path("p")
    routed = "teacher={kind: routed, domains: {a: {kind: cached}, b: {kind: cached, path: p}}}"
    run = _run(routed, "out=o")
    assert [cache_folder(run, domain) for domain in "ab"] == [Path("o/cache/a"), Path("p")]
