"""How often a step makes the host wait for a GPU, in dskd's own lines: for the step before."""

import json
from pathlib import Path

import pytest

from dskd.batch import Batch
from dskd.fused import per_token, topk_teacher
from dskd.training.trainer import Trainer
from tests.equivalence.small import LIVE, Runs, cached, causal, routed
from tests.training.waits import HostWaits

HARD = {"masking": {"kind": "hard_tokens", "metric": "quantile"}}
RUNS = {
    "plain": {"method": {"kind": "lm"}, "teacher": None},
    "live": {"teacher": LIVE},
    "routed": {"teacher": routed(LIVE, LIVE)},
    "cached": {"teacher": cached(LIVE)},
    "causal": causal(),
    "self": {"method": {"kind": "self_evolution"}, "teacher": {"kind": "self"}, "data": HARD},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("waits"))


def watched(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """Have every step append the waits in it, by line, to a file."""
    launch, move = Trainer._launch, Batch.to

    def watched_launch(self: Trainer, stop: bool):
        with HostWaits() as waits:
            waits.put(self.engine.module.parameters())
            if self._unread is not None:
                waits.put([self._unread.queued._values._values])
            monkeypatch.setattr(Batch, "to", lambda batch, device: moved(waits, batch, device))
            result = launch(self, stop)
        with out.open("a") as stream:
            stream.write(json.dumps(waits.lines) + "\n")
        return result

    def moved(waits: HostWaits, batch: Batch, device: object) -> Batch:
        found = move(batch, device)
        read_by_models = (found.ids_BT, found.mask_BT, found.labels_BT, found.positions_N)
        waits.put([*read_by_models, found.labels_N, *found.columns.values()])
        return found

    monkeypatch.setattr(Trainer, "_launch", watched_launch)
    for module in (per_token, topk_teacher):
        monkeypatch.setattr(module, "looks", lambda values: False)  # it looks at CPU tensors alone


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_two_micro_batches_waits_for_the_one_before(
    runs, tmp_path, monkeypatch, name, stage
):
    watched(monkeypatch, tmp_path / "waits.jsonl")
    every = ["evaluation.every=4", "checkpoint.every=4"]  # what ends with its own numbers read
    runs.run(f"{name}{stage}", 1, f"deepspeed=zero{stage}", *every, **RUNS[name])
    steps = [json.loads(line) for line in (tmp_path / "waits.jsonl").read_text().splitlines()]
    assert [sum(waits.values()) for waits in steps] == [0, 1, 1, 1], steps
    for waits in steps[1:]:
        assert next(iter(waits)).startswith("system/device.py:")
