"""How often the host waits for a GPU in dskd's own lines: in a step for the one before, and in an
evaluation, of however many batches, for its results."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dskd.batch import Batch
from dskd.data.prefetch import Sent
from dskd.fused import per_token, topk_teacher
from dskd.training.trainer import Trainer
from tests.equivalence import test_labelled as labelled
from tests.equivalence.small import LIVE, Runs, cached, causal, routed
from tests.equivalence.tables import Tables
from tests.equivalence.test_balance import mixture
from tests.training.waits import HostWaits

HARD = {"masking": {"kind": "hard_tokens", "metric": "quantile"}}
RUNS = {
    "plain": {"method": {"kind": "lm"}, "teacher": None},
    "live": {"teacher": LIVE},
    "routed": {"teacher": routed(LIVE, LIVE)},
    "cached": {"teacher": cached(LIVE)},
    "causal": causal(),
    "experts": causal(mixture("qwen3_moe")),
    "self": {"method": {"kind": "self_evolution"}, "teacher": {"kind": "self"}, "data": HARD},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("waits"))


def watched(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """Have every step and every evaluation append the waits in it, by line, to a file."""
    plain = Sent.on_device

    def watching(what: str, function: Callable) -> Callable:
        def call(trainer: Trainer, *args):
            with HostWaits() as waits:
                waits.put(trainer.engine.module.parameters())
                if trainer._unread is not None:
                    waits.put([trainer._unread.queued._values._values])
                monkeypatch.setattr(Sent, "on_device", lambda sent: arrived(waits, sent))
                result = function(trainer, *args)
            with out.open("a") as stream:
                stream.write(json.dumps([what, waits.lines]) + "\n")
            return result

        return call

    def arrived(waits: HostWaits, sent: Sent) -> Batch:
        found = plain(sent)
        read_by_models = (found.ids_BT, found.mask_BT, found.labels_BT, found.positions_N)
        waits.put([*read_by_models, found.labels_N, *found.columns.values()])
        waits.put([] if found.types_BT is None else [found.types_BT])
        return found

    for what, name in (("step", "_launch"), ("evaluation", "_score")):
        monkeypatch.setattr(Trainer, name, watching(what, getattr(Trainer, name)))
    for module in (per_token, topk_teacher):
        monkeypatch.setattr(module, "looks", lambda values: False)  # it looks at CPU tensors alone


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_two_micro_batches_waits_once_and_so_does_an_evaluation(
    runs, tmp_path, monkeypatch, name, stage
):
    watched(monkeypatch, tmp_path / "waits.jsonl")
    every = ["evaluation.every=4", "checkpoint.every=4", "evaluation.micro_batch=2"]
    runs.run(f"{name}{stage}", 1, f"deepspeed=zero{stage}", *every, **RUNS[name])
    _waits_once_each(tmp_path)


@pytest.mark.parametrize("model", [labelled.BERT, labelled.CAUSAL], ids=["first", "last"])
def test_so_it_is_where_a_head_reads_whole_rows(runs, tmp_path, monkeypatch, model):
    watched(monkeypatch, tmp_path / "waits.jsonl")
    every = ["evaluation.every=4", "checkpoint.every=4", "evaluation.micro_batch=2"]
    labelled.run(runs, "labelled", 1, model, *every)
    _waits_once_each(tmp_path)


@pytest.mark.parametrize("numbers", [False, True], ids=["classes", "numbers"])
def test_so_it_is_where_values_of_each_row_are_kept(tmp_path, monkeypatch, numbers):
    watched(monkeypatch, tmp_path / "waits.jsonl")
    words = ["evaluation.every=4", "checkpoint.every=4", "train.steps=4"]
    Tables(tmp_path).run("kept", 1, *words, numbers=numbers)
    _waits_once_each(tmp_path)


def _waits_once_each(tmp_path):
    found = [json.loads(line) for line in (tmp_path / "waits.jsonl").read_text().splitlines()]
    counts = [(what, sum(waits.values())) for what, waits in found]
    steps = [("step", 0), ("step", 1), ("step", 1), ("step", 1)]
    assert counts == [*steps, ("evaluation", 1)], found
    places = [next(iter(waits)).partition(":")[0] for _, waits in found if waits]
    assert places == [*3 * ["training/step_numbers.py"], "training/evaluation.py"]
