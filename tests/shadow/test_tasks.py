"""Tasks in turn on the device: samples, answers, importances, scores are those of the CPU."""

import json

import pytest

from tests.equivalence.small import step_lines
from tests.faults.test_task_kills import TASKS, write_recipe
from tests.launching import forked
from tests.shadow.cases import on_cpu, plain_losses


def test_a_stream_of_tasks_is_that_of_the_cpu(tmp_path):
    recipe = write_recipe(tmp_path)
    here, there = tmp_path / "device", tmp_path / "cpu"
    still = [f"model.config.{name}_pdrop=0" for name in ("resid", "embd", "attn")]
    still += [f"runs.{task}.teacher.precision=fp32" for task in TASKS]  # `auto` is bf16 on a GPU
    with plain_losses():
        forked(1, recipe, f"out={here}", *still)
    with on_cpu():
        forked(1, recipe, f"out={there}", *still)
    written = [f"{task}/answers/{other}.jsonl" for task in TASKS for other in TASKS]
    written += [f"{task}-teacher/distilled.jsonl" for task in TASKS]
    written += ["maj/replay/rev.jsonl", "shift/replay/rev.jsonl", "shift/replay/maj.jsonl"]
    for name in written:
        assert (here / name).read_text() == (there / name).read_text(), name
    for task in TASKS:
        found, wanted = [
            json.loads((out / task / "scores.json").read_text()) for out in (here, there)
        ]
        assert found == pytest.approx(wanted, abs=1e-5)
        assert [line["loss"] for line in step_lines(here / task)] == pytest.approx(
            [line["loss"] for line in step_lines(there / task)], abs=1e-5
        )
        assert (here / task / "importance" / "omega.safetensors").exists()
