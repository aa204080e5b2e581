"""One trajectory on labelled rows, whatever ZeRO stage, world size, micro-batch and stops."""

from pathlib import Path

import pytest

from dskd.ops import triton_everywhere
from tests.data.test_labelled import CLASSES, write
from tests.equivalence import small
from tests.equivalence.small import STEPS, Runs, same
from tests.launching import evaluations, losses

# Far from uniform, so that it matters which row has which class, and what its pair is.
BERT = small.MASKED | {"model_type": "bert", "initializer_range": 0.3}
CAUSAL = small.CAUSAL | {"initializer_range": 0.3}
DEBERTA = BERT | {"model_type": "deberta-v2", "relative_attention": True, "type_vocab_size": 2}


def rows() -> list[dict]:
    """Pairs whose class is said by their last word."""
    words = ["bird", "rule", "stone", "wave"]
    return [
        {"a": f"{'so ' * (i * 7 % 13)}the {i}", "b": f"a {words[i % 4]}", "label": CLASSES[i % 4]}
        for i in range(96)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("labelled"))


def run(runs: Runs, name: str, ranks: int, model: dict, *words: str) -> Path:
    """A run of cross entropy on the rows."""
    path = write(runs.folder / "rows.jsonl", rows())
    source = {"kind": "jsonl", "path": path, "field": "a", "pair": "b", "label": "label"}
    data = {"objective": "classification", "sources": [source], "validation": None}
    data |= {"validation_fraction": 0.3}
    return runs.run(
        f"{name}-{model['model_type']}",
        ranks,
        "data.masking.draws=null",
        *words,
        data=data,
        model={"config": model},
        method={"kind": "lm"},
        teacher=None,
    )


@pytest.fixture(scope="module")
def reference(runs) -> dict[str, Path]:
    return {each["model_type"]: run(runs, "one", 1, each) for each in (BERT, CAUSAL, DEBERTA)}


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("whole", 1, ("train.micro_batch=8",)),
        ("zero1", 2, ("deepspeed=zero1", "train.micro_batch=2")),
        ("zero2", 2, ("deepspeed=zero2", "train.micro_batch=4")),
        ("zero3", 2, ("deepspeed=zero3", "train.micro_batch=2")),
    ],
)
def test_one_trajectory(runs, reference, name, ranks, words):
    same(run(runs, name, ranks, BERT, *words), reference["bert"])


@pytest.mark.parametrize("model", [CAUSAL, DEBERTA], ids=["last token", "relative positions"])
def test_one_trajectory_of_other_heads(runs, reference, model):
    words = ("deepspeed=zero3", "train.micro_batch=4")
    same(run(runs, "zero3", 2, model, *words), reference[model["model_type"]])


def test_the_kernels_take_as_few_columns_as_there_are_classes(runs, reference):
    """In Triton's interpreter."""
    with triton_everywhere():
        same(run(runs, "kernels", 1, BERT), reference["bert"])


def test_it_trains(reference):
    for out in reference.values():
        assert len(losses(out)) == STEPS
        assert losses(out)[0] != pytest.approx(losses(out)[1], abs=1e-2)
        assert evaluations(out)[-1] != pytest.approx(evaluations(out)[0], abs=1e-2)


@pytest.mark.parametrize(("ranks", "words"), [(1, ()), (2, ("deepspeed=zero2",))])
def test_one_trajectory_over_a_stop(runs, reference, ranks, words):
    """Gone on with as it began, and on more ranks at another stage."""
    runs.copied(reference["bert"], f"stopped{ranks}-bert", step=2)
    same(run(runs, f"stopped{ranks}", ranks, BERT, *words), reference["bert"])
