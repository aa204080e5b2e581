"""kill -9 at any moment of a stream of tasks: the same command ends it where it would have."""

import random
import shutil
import time
from pathlib import Path

from launch.l2kd.toys import write
from tests.faults.runs import Ranks, train
from tests.launching import losses

KILLS = 10
TASKS = ("rev", "maj", "shift")
STEPS = 4
RECIPE = """
base:
  out: {folder}/run
  seed: 3
  deepspeed: zero2
  teacher: null
  data:
    folder: {folder}/data
    objective: causal
    questions:
      task_tokens: {{rev: __rev__, maj: __maj__, shift: __shift__}}
      room: 6
      modelling: true
    tokenizer: {{kind: pretrained, path: {folder}/tokenizer}}
    block_size: 16
  model:
    config:
      model_type: gpt2
      n_embd: 32
      n_layer: 1
      n_head: 2
      n_positions: 16
  train: {{steps: 4, batch: 8, micro_batch: 2, lr: 0.01, warmup: 1, precision: fp32}}
  evaluation: {{every: 2, rows: 4, micro_batch: 8}}
  checkpoint: {{every: 2, keep: 1}}
tasks:
{tasks}
teachers: {{method: {{kind: l2kd, distil: {{}}}}}}
sequences:
  all:
    earlier: replayed
    teacher: true
    distilled: true
    method:
      kind: l2kd
      word_kd: true
      replay: {{share: 0.4, rounds: 60}}
      penalty: {{kind: ewc, earlier: run:previous}}
"""
"""Three teachers that answer their questions, and three students with dropout: of these answers, of
the teachers' distributions and of rows that the student before has written."""
TASK = """
  {name}:
    sources: [{{kind: questions, path: {folder}/{name}-train.jsonl}}]
    validation: &{name} [{{kind: questions, path: {folder}/{name}-test.jsonl}}]
    test: {{sources: *{name}, metric: em}}
"""


def write_recipe(folder: Path) -> str:
    """The questions of three tasks and the recipe in ``folder``; the recipe's path."""
    write(folder, noise=0.0, seed=1, count=40, tests=6)
    tasks = "".join(TASK.format(folder=folder, name=name) for name in TASKS)
    (folder / "tasks.yaml").write_text(RECIPE.format(folder=folder, tasks=tasks))
    return str(folder / "tasks.yaml")


def results(out: Path) -> dict[str, bytes]:
    """What all runs of the recipe leave for others, by file."""
    names = ("scores.json", "distilled.jsonl")
    folders = ("export/*.safetensors", "replay/*.jsonl", "importance/*", "answers/*.jsonl")
    found = [path for name in names for path in out.glob(f"*/{name}")]
    found += [path for pattern in folders for path in out.glob(f"*/{pattern}")]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_a_stream_of_tasks_killed_at_random_moments(tmp_path):
    """Ten kills of a chain of six runs: weights, samples, importances and all scores of the matrix
    are those of the undisturbed one, bit for bit."""
    recipe = write_recipe(tmp_path)
    began = time.monotonic()
    train(tmp_path, recipe)
    seconds = time.monotonic() - began
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "data")
    draw = random.Random(7)
    for _ in range(KILLS):
        ranks = Ranks(tmp_path, recipe)
        if ranks.wait(draw.uniform(0, seconds / 3)):
            assert ranks.statuses() == [0, 0], ranks.output()
            shutil.rmtree(tmp_path / "run")  # another one, from the start
        ranks.kill()
    train(tmp_path, recipe)
    undisturbed = results(tmp_path / "undisturbed")
    assert len([name for name in undisturbed if name.endswith("scores.json")]) == 6
    assert len([name for name in undisturbed if "/replay/" in name]) == 3
    assert results(tmp_path / "run") == undisturbed
    for task in TASKS:
        assert len(losses(tmp_path / "run" / task)) == STEPS
        assert losses(tmp_path / "run" / task) == losses(tmp_path / "undisturbed" / task)
    assert not list(tmp_path.glob("run/**/*.part"))
