"""One trajectory whatever the geometry.

All runs train the same student (fp32, no dropout) for a few steps with different micro-batches,
world sizes, ZeRO stages, teachers and interruptions; the losses must agree to 1e-5. Two of them are
started by the user's own command, the others in ranks forked from the test process.
"""

from pathlib import Path

import pytest

from tests.equivalence.small import same
from tests.launching import cut_back, deepspeed, forked, losses

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

STEPS = 6
SETTINGS = """
seed: 3
deepspeed: zero0
data:
  folder: {data}
  sources: [{{kind: builtin, documents: 60}}]
  tokenizer: {{vocab_size: 320}}
  block_size: 32
  masking: {{draws: 2}}
model:
  config: &small
    model_type: roberta
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    intermediate_size: 64
    hidden_dropout_prob: 0.0
    attention_probs_dropout_prob: 0.0
teacher: {{{teacher}, model: {{config: {{<<: *small, hidden_size: 16}}}}}}
method: {{kind: ki, temperature: 2.0, schedule: linear, steps: 5}}
train: {{steps: 6, batch: 8, micro_batch: 8, lr: 0.01, warmup: 2, precision: fp32, clip: 1.0}}
evaluation: {{every: 3, rows: 12}}
checkpoint: {{every: 3}}
until: train
"""
LIVE = "kind: live"
CACHED = "kind: cached, k: 320, values: fp32, rows_per_shard: 8"
LAUNCHED = ("reference", "zero3")


class Runner:
    """Runs variations of the settings in one folder, each once."""

    def __init__(self, folder: Path):
        self._folder = folder

    def run(self, name: str, ranks: int, *words: str, teacher: str = LIVE) -> Path:
        out, recipe = self._folder / name, self._folder / f"{name}.yaml"
        recipe.write_text(SETTINGS.format(data=self._folder / "data", teacher=teacher))
        words = (str(recipe), f"out={out}", *words)
        if name in LAUNCHED:
            done = deepspeed(ranks, *words)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            forked(ranks, *words)
        return out


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    return Runner(tmp_path_factory.mktemp("equivalence"))


@pytest.fixture(scope="module")
def reference(runner) -> Path:
    """One rank, one micro-batch of 8, ZeRO-0, live teacher, never interrupted."""
    out = runner.run("reference", 1)
    assert len(losses(out)) == STEPS
    assert losses(out)[0] != pytest.approx(losses(out)[1], abs=1e-3)  # it does train
    return out


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("accumulated", 1, ["train.micro_batch=2"]),
        ("zero0", 2, ["train.micro_batch=4"]),
        ("zero1", 2, ["train.micro_batch=2", "deepspeed=zero1"]),
        ("zero2", 2, ["train.micro_batch=2", "deepspeed=zero2"]),
        ("zero3", 2, ["train.micro_batch=2", "deepspeed=zero3"]),
        ("sharded-teacher", 2, ["train.micro_batch=4", "teacher.deepspeed=zero3"]),
        ("cached", 1, []),
        ("cached-zero2", 2, ["train.micro_batch=2", "deepspeed=zero2"]),
    ],
)
def test_same_trajectory(runner, reference, name, ranks, words):
    teacher = CACHED if name.startswith("cached") else LIVE
    out = runner.run(name, ranks, *words, teacher=teacher)
    same(out, reference)


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("resume-zero0-zero2", (1, []), (2, ["train.micro_batch=4", "deepspeed=zero2"])),
        (
            "resume-zero3-zero1",
            (2, ["train.micro_batch=4", "deepspeed=zero3"]),
            (1, ["deepspeed=zero1"]),
        ),
    ],
)
def test_resumed_elsewhere(runner, reference, name, first, then):
    """Half the steps in one geometry, the rest in another: a checkpoint fits any."""
    out = runner.run(name, first[0], *first[1])
    cut_back(out, step=3)
    runner.run(name, then[0], *then[1])
    assert losses(out) == pytest.approx(losses(reference), abs=1e-5)
