"""Contradictions across settings, all told at once and by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dskd.checks import cache_folder, validate
from dskd.config import read
from dskd.errors import ConfigError
from dskd.method import build_method

CACHED = "teacher={kind: cached, model: {config: {model_type: bert}}}"
ROUTED = "teacher={kind: routed, domains: {a: {kind: live}, b: {kind: live}}}"
SOURCES = "data.sources=[{kind: text, path: x, domain: a}, {kind: text, path: y, domain: b}]"


@dataclass
class _Method:
    """A method as the checks see it."""

    kind: str = "ki"
    temperature: float = 2.0
    temperature_setting: str = "temperature"
    wants: bool = True

    def wants_teacher(self):
        return self.wants


def _run(*overrides):
    return read(None, overrides).runs["run"]


def _problems(*overrides, world=1, method=None, prefix=""):
    with pytest.raises(ConfigError) as caught:
        validate(_run(*overrides), world, method or _Method(), prefix)
    return str(caught.value).splitlines()


def test_the_toy_is_sound():
    run = _run()
    for world in (1, 2):
        validate(run, world, build_method(run.method))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.warmup=21"], "train.warmup: 21 is more than train.steps 20"),
        (["train.end_lr=1"], "train.end_lr: 1.0 is more than train.lr 0.001"),
        (
            ["data.masking.keep=0.6", "data.masking.random=0.5"],
            "data.masking.keep: 0.6 and data.masking.random 0.5 together exceed 1",
        ),
        (
            ["data.masking.whole_word=true", "data.masking.sampler=fairseq"],
            "data.masking.whole_word: the fairseq sampler selects tokens, not words",
        ),
        (
            ["model={}"],
            "model.config.model_type: missing; name a model type to build at random, or set"
            " model.path",
        ),
        (
            ["teacher.model={}"],
            "teacher.model.config.model_type: missing; name a model type to build at random, or"
            " set teacher.model.path",
        ),
        (["teacher=null"], "teacher: the method ki needs one"),
        (
            [CACHED],
            "data.masking.draws: missing; a cached teacher holds so many masks of each row"
            " (epoch e uses e % draws)",
        ),
        (
            [CACHED, "teacher.temperatures=[1, 4]", "data.objective=causal"],
            "method.temperature: 2.0 is not in teacher.temperatures: 1.0, 4.0",
        ),
        (
            [CACHED, "teacher.temperatures=[2, 2]", "data.masking.draws=3"],
            "teacher.temperatures: [2.0, 2.0] has one twice",
        ),
        (
            ["teacher={kind: cached}", "data.masking.draws=3"],
            "teacher.model: missing; name a model to capture from, or teacher.path",
        ),
        (
            ["evaluation.every=4", "checkpoint.every=10"],
            "checkpoint.every: 10 is not a multiple of evaluation.every 4; the best checkpoint is"
            " chosen by its evaluation",
        ),
        (
            [CACHED, "teacher.k=8", "teacher.use_k=9", "data.masking.draws=3"],
            "teacher.use_k: 9 is more than teacher.k 8",
        ),
        (
            [
                ROUTED,
                SOURCES,
                "teacher.domains.b.kind=cached",
                "teacher.domains.b.path=x",
                "data.masking.draws=1",
            ],
            "teacher.domains: all must be live or all cached, but: a live, b cached",
        ),
        (
            [
                SOURCES,
                "data.masking.draws=1",
                "teacher={kind: routed, domains: {a: {kind: cached, path: x},"
                " b: {kind: cached, path: x}}}",
            ],
            "teacher.domains.b.path: the same folder as that of 'a'",
        ),
    ],
)
def test_a_contradiction(overrides, line):
    assert _problems(*overrides) == [line]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "line"),
    [
        (
            16,
            8,
            3,
            "16 is not a multiple of train.micro_batch 8 x 3 ranks = 24; the nearest that are: 24",
        ),
        (
            20,
            8,
            1,
            "20 is not a multiple of train.micro_batch 8 x 1 rank = 8; the nearest"
            " that are: 16 or 24",
        ),
    ],
)
def test_batch_geometry(batch, micro, world, line):
    overrides = [f"train.batch={batch}", f"train.micro_batch={micro}"]
    assert _problems(*overrides, world=world) == [f"train.batch: {line}"]


def test_domains_must_match():
    assert _problems(ROUTED, SOURCES.replace("domain: b", "domain: bb")) == [
        "teacher.domains.b: no source has this domain; did you mean 'bb'?",
        "teacher.domains: no teacher for the domain 'bb' of data.sources",
    ]
    validate(_run(ROUTED, SOURCES), 1, _Method())


def test_all_at_once_under_the_name_of_the_run():
    lines = _problems("train.warmup=30", "teacher=null", world=3, prefix="runs.student")
    assert [line.split(":")[0] for line in lines] == [
        "runs.student.train.batch",
        "runs.student.train.warmup",
        "runs.student.teacher",
    ]


def test_a_method_without_teacher_asks_nothing_of_it():
    validate(_run("teacher=null"), 1, _Method(kind="lm", wants=False))
    validate(_run(CACHED), 1, _Method(kind="lm", temperature=9.0, wants=False))
    validate(_run(CACHED), 1)


def test_more_may_be_used_of_a_cache_captured_elsewhere():
    overrides = ["teacher={kind: cached, path: x, use_k: 64}", "data.masking.draws=1"]
    validate(_run(*overrides), 1, _Method())


def test_cache_folders():
    assert cache_folder(_run(CACHED, "out=o")) == Path("o/cache")
    assert cache_folder(_run(CACHED, "teacher.path=p")) == Path("p")
    routed = "teacher={kind: routed, domains: {a: {kind: cached}, b: {kind: cached, path: p}}}"
    run = _run(routed, "out=o")
    assert [cache_folder(run, domain) for domain in "ab"] == [Path("o/cache/a"), Path("p")]
