"""What is refused before a recipe's runs start, and what as soon as their models are there."""

import json
import math
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors import safe_open

from dskd.engine import run_config
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.models import weight_files
from dskd.runs.plan import check
from dskd.runs.report import table
from dskd.settings.recipe import dump_run, read
from dskd.settings.yaml_tree import dump, merge
from tests.launching import forked

BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
BERT["num_attention_heads"] = 4
REPOSITORY = "somebody/teacher"
WID = {"kind": "wid", "hidden_size": 16, "every": 1, "ramp": 1, "anneal": 1}


def recipe_of(folder: Path, runs: dict) -> Path:
    """A recipe's file; the runs write to ``<folder>/runs``."""
    base = {
        "out": f"{folder}/runs",
        "deepspeed": "zero0",
        "method": {"kind": "lm"},
        "teacher": None,
        "data": {
            "folder": f"{folder}/data",
            "sources": [{"kind": "builtin", "documents": 30}],
            "tokenizer": {"vocab_size": 320},
            "block_size": 32,
        },
        "train": {"steps": 2, "batch": 4, "micro_batch": 4, "warmup": 0, "precision": "fp32"},
        "evaluation": {"every": 2, "rows": 8},
        "checkpoint": {"every": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(dump({"base": base, "runs": runs}))
    return path


def checked(path: Path, *overrides: str) -> None:
    """The checks of a recipe before anything starts."""
    recipe = read(path, overrides)
    check(recipe, {name: build_method(run.method) for name, run in recipe.runs.items()}, world=1)


def test_the_files_of_a_stage_that_the_other_settings_do_not_have_are_seen(tmp_path):
    hard = {"model": {"config": BERT}, "data": {"masking": {"kind": "hard_tokens"}}}
    path = recipe_of(tmp_path, {"only": hard})
    run = read(path).runs["only"]
    (run.out / "questions").mkdir(parents=True)
    (run.out / "config.yaml").write_text(dump_run(run))
    checked(path)
    checked(path, "data.masking.threshold=0.3")  # it chooses among the scores, which are the same
    changed = r"(?s)was started with other settings:.* data\.masking: 'hard_tokens', now 'random'"
    with pytest.raises(ConfigError, match=changed):
        checked(path, "data.masking.kind=random")


def test_bf16_at_zero_0_on_one_gpu_is_warned_of(tmp_path, monkeypatch, capfd):
    """On several it is refused: ``tests/engine/test_ds_config.py``."""
    path = recipe_of(tmp_path, {"only": {"model": {"config": BERT}}})
    checked(path, "train.precision=bf16")
    assert capfd.readouterr().out == ""
    monkeypatch.setattr(run_config, "on_gpu", lambda: True)
    checked(path, "train.precision=bf16", "deepspeed=zero1")
    assert capfd.readouterr().out == ""
    checked(path, "train.precision=bf16")
    told = "warning: zero0: zero_optimization.stage: 0 in bf16 lets the host wait twice for its GPU"
    assert capfd.readouterr().out.startswith(told)


# ---- exports that are not there yet --------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_starts_from_its_own_export_is_refused(tmp_path, there):
    """Whether an earlier call left one or not."""
    export = tmp_path / "runs" / "only" / "export"
    if there:
        export.mkdir(parents=True)
    model = {"path": f"{tmp_path}/runs/../runs/only/export"}
    path = recipe_of(tmp_path, {"only": {"model": model}})
    with pytest.raises(ConfigError, match=r"^runs\.only\.model\.path: \S+ is what this run itself"):
        checked(path)


def test_runs_that_name_each_other_are_refused(tmp_path):
    runs = {
        name: {"model": {"path": f"{tmp_path}/runs/{other}/export"}}
        for name, other in (("first", "second"), ("second", "first"))
    }
    message = r"^runs\.first\.model\.path: \S+ is what the later run second exports"
    with pytest.raises(ConfigError, match=message):
        checked(recipe_of(tmp_path, runs))


def test_an_earlier_export_may_be_named_by_its_folder(tmp_path):
    """Its sizes are known before it is there."""
    start = {"model": {"config": BERT}}
    path = recipe_of(tmp_path, {"a": start, "b": {"model": {"path": f"{tmp_path}/runs/a/export/"}}})
    checked(path)
    with pytest.raises(ConfigError, match=r"^runs\.b\.model\.slice\.hidden_size: 18 is not"):
        checked(path, "runs.b.model.slice.hidden_size=18")
    with pytest.raises(ConfigError, match=r"^runs\.b\.model\.config\.hiden_size: a bert config"):
        checked(path, "runs.b.model.config.hiden_size=3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A teacher and the data that it was trained on."""
    folder = tmp_path_factory.mktemp("hub")
    path = recipe_of(folder, {"teacher": {"model": {"config": BERT}}})
    forked(1, str(path), "until=export")
    return folder


def test_a_folder_of_another_trained_tokenizer_is_refused_after_the_data(trained, tmp_path, capfd):
    """Only then is known what was trained; nothing was made of it yet."""
    model = {"path": str(trained / "runs" / "teacher" / "export")}
    other = {"sources": [{"kind": "builtin", "documents": 29}]}
    path = recipe_of(tmp_path, {"a": {"model": model, "data": other}})
    checked(path)
    forked(1, str(path), status=2)
    told = capfd.readouterr().err
    assert "error: the data's tokenizer and model.path" in told and "different vocabu" in told
    assert [made.name for made in (tmp_path / "runs" / "a").iterdir()] == ["config.yaml"]


# ---- a call with other settings ------------------------------------------------------------------


def test_random_masks_are_settled_by_the_first_call(tmp_path, capfd):
    """Even if it made no more than the rows; those of hard tokens are not."""
    path = str(recipe_of(tmp_path, {"a": {"model": {"config": BERT}}}))
    changed = "data.masking.probability=0.3"
    forked(1, path, "until=data")
    forked(1, path, "until=data", changed, status=2)
    assert "masking changed since the run was started" in capfd.readouterr().err
    hard = [f"out={tmp_path}/hard", "until=data", "data.masking.kind=hard_tokens"]
    forked(1, path, *hard)
    forked(1, path, *hard, changed)


# ---- what is counted ---------------------------------------------------------------------------


def assert_counts_what_is_exported(out: Path, *, trained_times: int) -> None:
    """A run's summary and table have the model that its user gets; the trained one is so many times
    as large, or larger."""
    with safe_open(out / "export" / "model.safetensors", framework="pt") as file:
        names = set(file.keys()) - {"cls.predictions.decoder.bias"}  # a second name of a bias
        exported = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    summary = json.loads((out / "train" / "summary.json").read_text())
    assert summary["parameters"] == exported
    trained = summary["trained_parameters"]
    assert trained == exported if trained_times == 1 else trained > trained_times * exported
    (cell, *_) = table({"run": out}, None).columns[1].cells
    assert cell == f"{exported:,}"


def test_without_a_change_all_that_is_trained_is_exported(trained):
    assert_counts_what_is_exported(trained / "runs" / "teacher", trained_times=1)


# ---- models of the hub ---------------------------------------------------------------------------


@pytest.fixture
def hub(trained, tmp_path, monkeypatch) -> Path:
    """The cache of a hub that holds the teacher, which only a download fills."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    home = cache / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = home / "snapshots" / ("1" * 40)

    def download(path: str, revision: str | None, patterns: list[str]) -> Path:
        assert path == REPOSITORY
        if not home.exists():
            (home / "refs").mkdir(parents=True)
            (home / "refs" / "main").write_text("1" * 40)
            shutil.copytree(trained / "runs" / "teacher" / "export", snapshot)
        return snapshot

    monkeypatch.setattr(weight_files, "_download", download)
    shutil.copytree(trained / "data", tmp_path / "data")
    return home


FROM_HUB = {
    "model": {"path": REPOSITORY},
    "method": WID | {"inherit": {"schedule": "constant"}},
    "teacher": {"kind": "cached", "k": 8, "model": {"path": REPOSITORY}},
    "data": {"masking": {"draws": 1}},
}
CUT = {"path": REPOSITORY, "slice": {"hidden_size": 18}}
LATE = {
    "a method's size": ({"method": WID | {"hidden_size": 18}}, {}, "runs.a.method.hidden_size"),
    "a slice's size": ({"model": CUT}, {}, "runs.a.model.slice.hidden_size"),
    "a later run's": ({}, {"b": {"model": CUT}}, "runs.b.model.slice.hidden_size"),
}


@pytest.mark.parametrize("case", LATE)
def test_a_downloaded_model_is_looked_at_before_anything_is_made_of_it(case, hub, tmp_path, capfd):
    """Right after the data stage, not after a capture or another run."""
    changed, others, setting = LATE[case]
    path = recipe_of(tmp_path, {"a": merge(FROM_HUB, changed)} | others)
    checked(path)
    assert not hub.exists()
    forked(1, str(path), status=2)
    assert f"error: {setting}: 18 is not a multiple of the 4 heads" in capfd.readouterr().err
    assert hub.exists()
    assert [made.name for made in (tmp_path / "runs" / "a").iterdir()] == ["config.yaml"]
    with pytest.raises(ConfigError, match=setting):  # it is at hand now
        checked(path)


def test_a_config_that_is_at_hand_is_looked_at_and_nothing_downloaded(hub, tmp_path, monkeypatch):
    """As when another program has read no more than the config."""
    snapshot = weight_files._download(REPOSITORY, None, [])
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(weight_files, "_download", lambda *rest: pytest.fail("it was downloaded"))
    with pytest.raises(ConfigError, match=r"^runs\.a\.method\.hidden_size: 18"):
        checked(recipe_of(tmp_path, {"a": merge(FROM_HUB, {"method": {"hidden_size": 18}})}))


def test_the_same_recipe_with_a_size_that_goes_is_carried_out(hub, tmp_path):
    cut = {"model": {"path": REPOSITORY, "slice": {"hidden_size": 16}}, "until": "slice"}
    forked(1, str(recipe_of(tmp_path, {"a": FROM_HUB, "b": cut})))
    scores = json.loads((tmp_path / "runs" / "a" / "scores.json").read_text())
    assert scores["eval_nll"] > 0
    assert_counts_what_is_exported(tmp_path / "runs" / "a", trained_times=2)
    left = {path.name for path in (tmp_path / "runs" / "b").iterdir()}
    assert left == {"config.yaml", "inputs.json", "sliced"}
