"""Every method and every kind of teacher as a tiny run, on the shadow device and on the CPU."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepspeed.accelerator import real_accelerator

from dskd.fused import backend, gradients, update
from dskd.settings.yaml_tree import merge
from tests.data.test_questions import TASKS, data_of
from tests.equivalence import small
from tests.equivalence.small import MASKED, OTHER, TEACHER, Runs, cached, causal, routed
from tests.equivalence.tables import write_table
from tests.ranks import run_ranks

EXACT = {"precision": "fp32"}  # on a GPU `auto` is bf16
LIVE, LIVE_OTHER = small.LIVE | EXACT, small.LIVE_OTHER | EXACT
STUDENT = {"config": MASKED | {"num_hidden_layers": 1}}
HARD = {"masking": {"kind": "hard_tokens", "metric": "quantile"}}
SMOOTHED = {"kind": "self_evolution", "smoothing": 0.5}
WID = {"kind": "wid", "hidden_size": 16, "every": 1, "ramp": 1, "anneal": 1, "lr": 0.01}

SOFT = {"kind": "muki", "choice": "soft", "normalise": "batch_mean"}
PANEL = {
    "kind": "panel",
    "passes": 3,
    "at_once": 2,
    "dropout": 0.2,
    "micro_batch": 4,
    "teachers": {
        "one": {"model": {"config": MASKED | TEACHER}, "labels": ["fruit", "bird"]} | EXACT,
        "two": {"model": {"config": MASKED | OTHER}, "labels": ["tree", "fruit"]} | EXACT,
    },
}
"""Two classifiers, one class in common, whose several passes drop."""

FROZEN = {"kind": "self", "weights": "frozen"} | EXACT


def panel(**teachers: dict[str, Any]) -> dict[str, Any]:
    """Language models that are mixed by how sure they are."""
    return {"kind": "panel", "teachers": teachers, "mixture": {"rule": "confidence_soft"}}


CAPTURED = {"temperatures": [1.0, 2.0]}
CASES: dict[str, dict[str, Any]] = {
    "lm": {"method": {"kind": "lm"}, "teacher": None},
    "ki live": {"teacher": LIVE},
    "ki causal": merge(causal(), {"teacher": EXACT}),
    "ki routed": {"teacher": routed(LIVE, LIVE_OTHER)},
    "ki cached": {"teacher": cached(LIVE)},
    "ki panel": {"teacher": panel(a=LIVE, b=LIVE_OTHER)},
    "ki panel cached": {
        "teacher": panel(a=cached(LIVE) | CAPTURED, b=cached(LIVE_OTHER) | CAPTURED)
    },
    "self current": {"method": SMOOTHED, "teacher": {"kind": "self"}, "data": HARD},
    "self frozen": {"method": SMOOTHED, "teacher": FROZEN},
    "self average": {"method": SMOOTHED, "teacher": {"kind": "self", "weights": "average"}},
    "wid": {"method": WID, "teacher": None},
    "finetune": {"method": {"kind": "finetune"}, "teacher": None},
    "muki stored": {"method": SOFT, "teacher": PANEL},
    "muki live": {"method": {"kind": "muki"}, "teacher": PANEL | {"scores": "live"}},
    "uhc stored": {"method": {"kind": "uhc"}, "teacher": PANEL | {"passes": 1, "dropout": None}},
    "l2kd replayed": {"method": {"word_kd": True}, "teacher": causal()["teacher"] | EXACT},
    "l2kd penalty": {"method": {"penalty": {"kind": "ewc", "strength": 30.0}}},
    "l2kd memories": {"method": {"memories": {"kind": "gem", "share": 0.5, "per_step": 4}}},
}
LABELLED = ("finetune", "muki stored", "muki live", "uhc stored")
"""Cases on rows of classes."""


def ranks_of(stage: int) -> int:
    """Two where gradients or weights are spread over the ranks."""
    return 2 if stage >= 2 else 1


def train(
    runs: Runs, name: str, case: str, stage: int, precision: str, *words: str, **more: Any
) -> Path:
    """The run of a case, of two steps of two micro-batches a rank; its teachers in fp32."""
    changes = dict(CASES[case])
    if case == "wid":
        changes["model"] = STUDENT | {"path": str(weights(runs))}
    if case in LABELLED:
        changes["data"] = table(runs)
    if case.startswith("l2kd"):
        changes = second_task(runs, changes)
    size = 4 * ranks_of(stage)
    steps = ("train.steps=2", f"train.batch={size}", "train.micro_batch=2")
    words = (f"deepspeed=zero{stage}", f"train.precision={precision}", *steps, *words)
    return runs.run(name, ranks_of(stage), *words, **changes | more)


def table(runs: Runs) -> dict[str, Any]:
    """The data of rows of three classes, written once."""
    if not (runs.folder / "rows.tsv").exists():
        for name, rows, salt in (("valid", 11, 1), ("rows", 42, 0)):
            write_table(runs.folder / f"{name}.tsv", rows, salt)
    train, valid = (
        [{"kind": "tsv", "path": str(runs.folder / f"{name}.tsv"), "label": "y"}]
        for name in ("rows", "valid")
    )
    data = {"objective": "classification", "sources": train, "validation": valid}
    return data | {"masking": {"draws": None}}


def second_task(runs: Runs, case: dict[str, Any]) -> dict[str, Any]:
    """The settings of a case that learns a task after another one."""
    earlier, method = first_task(runs), {"kind": "l2kd", **case["method"]}
    one, two = task_data(runs)["sources"]
    own = {"sources": [two], "tokenizer": {"kind": "pretrained", "path": str(earlier / "export")}}
    if "penalty" in method:
        method["penalty"] = {**method["penalty"], "earlier": str(earlier)}
    if "memories" in method:
        own["memory"] = [one]
    if method.get("word_kd"):
        own["sources"] = [two, {**one, "kind": "replayed"}]
    model = {"path": str(earlier / "export"), "config": small.CAUSAL}
    data = task_data(runs) | own
    still = {"teacher": None, "train": {"clip": 0.0, "eps": 1e-4}}
    return still | case | {"method": method, "data": data, "model": model}


def first_task(runs: Runs) -> Path:
    """The run of the task before, made once."""
    out = runs.folder / "first task"
    if not out.exists():
        data = task_data(runs)
        data["sources"] = data["sources"][:1]
        method = {"kind": "l2kd", "penalty": CASES["l2kd penalty"]["method"]["penalty"]}
        how = {"method": method, "teacher": None, "model": {"config": small.CAUSAL}}
        words = ("deepspeed=zero0", "train.steps=2", "evaluation.every=2")
        with on_cpu():
            runs.run(out.name, 1, *words, data=data, until="importance", **how)
    return out


def task_data(runs: Runs) -> dict[str, Any]:
    """The data of two tasks."""
    kept = {"objective", "sources", "validation_fraction"}
    data = data_of(runs.folder).model_dump(mode="json", include=kept)
    questions = {"task_tokens": TASKS, "room": 6, "modelling": True}
    plain = {"packing": "complete", "masking": {"draws": None}, "validation": None}
    return data | plain | {"questions": questions, "validation_fraction": 0.3}


def weights(runs: Runs) -> Path:
    """A folder of random weights, made once."""
    if not (runs.folder / "weights").exists():
        still = {"steps": 1, "lr": 1e-12, "precision": "fp32"}
        plain = {"method": {"kind": "lm"}, "teacher": None, "until": "export"}
        runs.run("weights", 1, "deepspeed=zero1", model=STUDENT, train=still, **plain)
    return runs.folder / "weights" / "export"


def in_fork(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test that makes gradients in a fork: torch forks no process that has made some."""

    @functools.wraps(test)
    def call(**fixtures: Any) -> None:
        run_ranks(lambda rank: test(**fixtures), world=1)

    return call


@contextmanager
def on_cpu() -> Iterator[None]:
    """Ranks that are forked inside compute on the CPU, as if there were no device."""
    with (
        patch.dict("os.environ", DS_ACCELERATOR="cpu"),
        patch.object(real_accelerator, "ds_accelerator", None),
    ):
        yield


@contextmanager
def plain_losses() -> Iterator[None]:
    """Ranks that are forked inside use the closed forms in place of the kernels, for which there is
    the interpreter only: slow, and wrong in bf16."""

    def none(tensor: object) -> bool:
        return False

    with ExitStack() as stack:
        for module in (backend, gradients, update):
            stack.enter_context(patch.object(module, "on_triton", none))
        yield
