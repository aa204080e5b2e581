"""A method from outside dskd uses every seam: stage, store, reader, hook, probe, score, command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dskd.cli import main
from dskd.data.prepared import Prepared, open_prepared, prepare
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.runs.plan import check, is_done
from dskd.settings.recipe import read
from dskd.stores.store import Store
from dskd.system.files import read_manifest
from dskd.system.log import read_metrics
from tests.equivalence.small import CAUSAL, Runs, causal
from tests.launching import cut_back, losses

MARGIN = 0.15
METHOD = {"kind": "my_package.my_file:MyMethod", "margin": MARGIN}
STEPS = 6


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Runs of the method; all ranks are forked from here, so that they have its module, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield Mine(tmp_path_factory.mktemp("mine"))


class Mine(Runs):
    def train(self, name: str, ranks: int, *words: str, **method: float) -> Path:
        changes = causal(CAUSAL | {"initializer_range": 0.3})
        changes["method"] = METHOD | method
        changes["teacher"] = None
        changes["train"] = {"steps": STEPS, "lr": 0.1}
        return self.run(name, ranks, *words, **changes)

    @property
    def recipe(self) -> Path:
        return self.folder / "one.yaml"


@pytest.fixture(scope="module")
def one(mine) -> Path:
    """On one rank, from data to scores."""
    return mine.train("one", 1, "until=evaluate", "deepspeed=zero0")


@pytest.fixture(scope="module")
def prepared(mine, one) -> Prepared:
    return open_prepared(prepare(read(one / "config.yaml").runs["run"].data))


def nll_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """By transformers alone, of one row: of every token but the first."""
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), 1)
    return -logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()


def guesses_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """The likeliest token in the place of every one but the first."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None]).logits[0, :-1].argmax(1).numpy()


def test_its_stage_fills_a_store_that_does_not_depend_on_ranks(mine, one, prepared):
    two = mine.train("stored", 2, "until=surprise", "deepspeed=zero2")
    assert not (two / "train").exists()
    for path in (one / "surprise").glob("shard-*"):
        assert path.read_bytes() == (two / "surprise" / path.name).read_bytes()
    store = Store(one / "surprise", kind="surprise", expect={})
    rows = prepared.train.rows(np.arange(5), np.zeros(5, np.int64))
    counts_B, columns = store.read(rows.ids_B, np.zeros(5, np.int64), ["nll"])
    assert counts_B.tolist() == (rows.lengths_B - 1).tolist()
    assert columns["nll"].std() > 0.5  # surprises differ: the start is far from uniform


def test_its_hook_projects_and_its_reader_weighs(mine, one):
    cosines = [line["cosine"] for line in read_metrics(one / "train/metrics.jsonl") if "lr" in line]
    assert len(cosines) == STEPS and all(-1 < cosine < 1 for cosine in cosines)
    assert min(cosines) < MARGIN < max(cosines), "some steps are projected, others are not"
    for name, value in (("weight", 0.0), ("margin", 0.0)):
        assert losses(mine.train(name, 1, "deepspeed=zero0", **{name: value})) != losses(one)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["deepspeed=zero2"]),
        (2, ["deepspeed=zero0", "train.micro_batch=2"]),
        (2, ["deepspeed=zero2"]),
        (2, ["deepspeed=zero3", "train.micro_batch=2"]),
    ],
)
def test_one_trajectory(mine, one, ranks, words):
    name = "-".join(["ranks", str(ranks), *(word.rpartition("=")[2] for word in words)])
    found = losses(mine.train(name, ranks, *words))
    assert found == pytest.approx(losses(one), abs=1e-5)


def test_a_stopped_run_goes_on(mine, one):
    again = mine.train("again", 1, "deepspeed=zero0")
    cut_back(again, 4)
    mine.train("again", 1, "deepspeed=zero0")
    assert losses(again) == losses(one)


def test_the_highest_accuracy_is_exported_and_scored(one, prepared):
    manifests = [
        read_manifest(path, ValueError)
        for path in sorted((one / "train/checkpoints").glob("step-*/manifest.json"))
    ]
    evaluated = {
        line["step"]: line["eval_accuracy"]
        for line in read_metrics(one / "train/metrics.jsonl")
        if "eval_accuracy" in line
    }
    summary = json.loads((one / "train/summary.json").read_text())
    assert summary["metric"] == "eval_accuracy" and summary["higher_is_better"]
    assert summary["best_eval_accuracy"] == max(evaluated.values())
    for manifest in manifests:
        score = {"metric": "eval_accuracy", "value": evaluated[manifest["step"]]}
        assert manifest["score"] == score | {"higher_is_better": True}
    model = AutoModelForCausalLM.from_pretrained(one / "export").eval()
    scores = json.loads((one / "scores.json").read_text())
    count = scores["eval_tokens"]
    rowset, limit = prepared.validation, 4
    ids = np.arange(limit) * len(rowset) // limit
    rows = rowset.rows(ids, np.zeros_like(ids))
    cut = [t[:n] for t, n in zip(rows.tokens_BT, rows.lengths_B, strict=True)]
    nll = np.concatenate([nll_of(model, tokens) for tokens in cut])
    assert len(nll) == count and nll.mean() == pytest.approx(scores["eval_nll"], abs=1e-5)
    right = sum(int((guesses_of(model, tokens) == tokens[1:]).sum()) for tokens in cut)
    assert scores["eval_accuracy"] == right / count == summary["best_eval_accuracy"]


def test_it_has_its_say_in_the_report_and_a_command(one, capsys):
    assert "<h2>Surprise</h2><p>run</p>" in (one / "report.html").read_text()
    assert main(["my_package.my_file:main", str(one)]) == 0
    lines = read_metrics(one / "train/metrics.jsonl")
    projected = sum(line["cosine"] < MARGIN for line in lines if "cosine" in line)
    assert capsys.readouterr().out == f"{projected}\n"


def test_its_stage_is_known_to_until(mine, one):
    recipe = read(mine.recipe, ["until=suprise", f"out={one}"])
    methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
    listed = "data, slice, cache, surprise, train, export, evaluate; did you mean 'surprise'"
    with pytest.raises(ConfigError, match=rf"^until: 'suprise' is not one of {listed}"):
        check(recipe, methods, world=1)


def test_a_store_that_is_only_begun_is_not_done(mine, one, tmp_path):
    (tmp_path / "surprise").mkdir()
    shutil.copy(one / "surprise" / "manifest.json", tmp_path / "surprise")
    recipe = read(mine.recipe, ["until=surprise", f"out={tmp_path}"])
    methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
    assert not is_done(recipe, methods)
