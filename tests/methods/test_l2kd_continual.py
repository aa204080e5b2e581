"""What method l2kd does for earlier tasks: which parts it wires, with which numbers, and what is
refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dskd.continual.kept_weights import KeptWeights
from dskd.data.prepared import open_prepared, prepare
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.settings.folders import data_settings
from dskd.settings.recipe import SINGLE, read
from dskd.settings.run import Run
from dskd.settings.yaml_tree import dump, merge
from tests.data.conftest import all_rows
from tests.data.test_questions import TASKS, data_of
from tests.equivalence import small
from tests.launching import forked
from tests.runs.test_plan import checked

EWC = {"kind": "ewc", "strength": 2.0}
TEXTS = {"task_tokens": TASKS, "room": 6, "modelling": True}


def recipe(folder: Path, **more: Any) -> Path:
    """Two tasks by one method, one after the other; with ``more`` of each run by its name."""
    data = data_of(folder).model_dump(mode="json", include={"objective", "sources", "folder"})
    up, down = data.pop("sources")
    data |= {"validation_fraction": 0.3, "block_size": 32}
    data["questions"] = TEXTS
    base = small.settings(folder) | {"out": str(folder / "runs"), "teacher": None, "data": data}
    base |= {"method": {"kind": "l2kd"}, "until": "export"}
    base["train"] |= {"steps": 2, "clip": 0}
    del base["model"]
    stored = {"kind": "pretrained", "path": "run:up"}
    runs = {
        "up": {
            "data": {"sources": [up], "tokenizer": {"kind": "trained", "vocab_size": 320}},
            "model": {"config": small.CAUSAL | {"initializer_range": 0.3}},
        },
        "down": {
            "data": {"sources": [down], "tokenizer": stored},
            "model": {"path": "run:up"},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(dump({"base": base, "runs": merge(runs, more)}))
    return path


def refused(folder: Path, told: str, *words: str, **more: Any) -> None:
    """The recipe is refused before anything starts."""
    with pytest.raises(ConfigError, match=told):
        checked(recipe(folder, **more), *words)


def written(folder: Path) -> list[dict[str, Any]]:
    """Sources of the task ``down``, and of rows of ``up`` that a model wrote."""
    path = folder / "written.jsonl"
    rows = [{"question": f"{word} up ?", "answer": word} for word in ("north", "river", "lamp")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        {"kind": "questions", "path": str(folder / "down.jsonl"), "domain": "down"},
        {"kind": "replayed", "path": str(path), "domain": "up"},
    ]


def plain_importances(run: Path, kind: str) -> dict[str, torch.Tensor]:
    """Of the exported model, in float64, one new row after the other."""
    data = data_settings(read(run / "config.yaml").runs[SINGLE])
    prepared = open_prepared(prepare(data))
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float64).eval()
    answer = prepared.tokenizer.convert_tokens_to_ids("__ans__")
    every = np.arange(len(prepared.train))
    new = every[prepared.train.domains_B(every) == prepared.domains.index("down")]
    assert 0 < len(new) == len(every) - 3  # the replayed ones are no new rows
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    rows = all_rows(prepared.train)
    for row in new.tolist():
        ids_T, begin = torch.tensor(rows[row]), rows[row].index(answer)
        log_TV = model(input_ids=ids_T[None]).logits[0].log_softmax(-1)
        if kind == "ewc":
            loss = -log_TV[begin:-1].gather(1, ids_T[begin + 1 :, None]).mean()
        else:
            loss = (log_TV[begin].exp() ** 2).mean()
        for name, gradient in zip(
            found, torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            found[name] += (gradient**2 if kind == "ewc" else gradient.abs()) / len(new)
    return found


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_importances_are_of_the_answers_to_new_questions(tmp_path, kind):
    """Also of a run that learns texts and replays, whose loss is another one; in fp32, whatever the
    run computes in."""
    changes = {"method": {"penalty": {"kind": kind}}, "data": {"sources": written(tmp_path)}}
    path = recipe(tmp_path, down=changes)
    forked(1, str(path), "train.precision=bf16", "runs.down.until=importance")
    out = tmp_path / "runs" / "down"
    kept = KeptWeights.of(out / "importance", {"kind": kind})
    weights = AutoModelForCausalLM.from_pretrained(out / "export", dtype=torch.float32)
    for name, wanted in plain_importances(out, kind).items():
        found = kept.omega.whole(name).double()
        assert (found - wanted).norm() < 1e-4 * wanted.norm(), name
        assert torch.equal(kept.anchor.whole(name), weights.get_parameter(name))
    assert not (tmp_path / "runs" / "up" / "importance").exists()


def test_importances_add_up_and_the_anchor_stays_the_first(tmp_path):
    first = {"method": {"penalty": {**EWC, "anchor": "first"}}}
    earlier = {"method": {"penalty": {"earlier": "run:up"}}}
    path = recipe(tmp_path, up=first, down=merge(first, earlier))
    forked(1, str(path), "until=importance")
    out = tmp_path / "runs"
    one, two = (KeptWeights.of(out / name / "importance", {}) for name in ("up", "down"))
    trained = AutoModelForCausalLM.from_pretrained(out / "up" / "export")
    for name, parameter in trained.named_parameters():
        assert not torch.equal(one.anchor.whole(name), parameter)
        assert torch.equal(one.anchor.whole(name), two.anchor.whole(name))
        assert (two.omega.whole(name) >= one.omega.whole(name)).all()
    made = (out / "down" / "importance" / "omega.safetensors").stat().st_mtime_ns
    forked(1, str(path), "until=importance")  # which finds all done
    assert (out / "down" / "importance" / "omega.safetensors").stat().st_mtime_ns == made


EARLIER = {"penalty": {**EWC, "earlier": "run:up"}}


def test_what_another_run_must_have_left(tmp_path):
    down = {"method": EARLIER}
    told = r"runs\.down\.method\.penalty\.earlier: run up has no stage importance, .* method l2kd"
    refused(tmp_path, told, down=down)
    checked(recipe(tmp_path, up={"method": {"penalty": EWC}}, down=down))
    told = r"run up leaves another kind \(mas, anchor latest\) than this run's \(ewc, anchor latest"
    refused(tmp_path, told, up={"method": {"penalty": {**EWC, "kind": "mas"}}}, down=down)
    told = rf"penalty\.earlier: {tmp_path}/x: there is no importance/omega\.safetensors in it"
    refused(tmp_path, told, f"runs.down.method.penalty.earlier={tmp_path}/x", down=down)
    (tmp_path / "x" / "importance").mkdir(parents=True)
    (tmp_path / "x" / "importance" / "omega.safetensors").touch()
    told = rf"{tmp_path}/x has importances of its own export, but model\.path is .*/runs/up/export"
    refused(tmp_path, told, f"runs.down.method.penalty.earlier={tmp_path}/x", down=down)
    told = r"method\.penalty\.earlier: .*/runs/down is of no earlier run of the recipe but down"
    own = f"runs.up.method.penalty.earlier={tmp_path}/runs/down"
    refused(tmp_path, told, own, up={"method": {"penalty": EWC}}, down=down)


def test_an_earlier_task_of_which_nothing_is_had(tmp_path):
    """The settings of a first task in a later one: nothing would be pulled or replayed."""
    both = {"method": {"penalty": EWC}}
    told = (
        r"runs\.down\.method: run up, as whose export this one starts, leaves importance, of which"
    )
    refused(tmp_path, told, up=both, down=both)
    replayed = {"data": {"sources": written(tmp_path)}, "method": {"replay": {}}}
    replayed["data"]["sources"][1]["path"] = None
    checked(recipe(tmp_path, down=replayed))
    answers = {"method": {"text_weight": 0}, "data": {"questions": {"modelling": False}}}
    told = r"one starts, is to write rows to replay, but learns none \(data\.questions\.modelling\)"
    refused(tmp_path, told, up=answers, down=replayed)
    both = {"method": {"replay": {}}}
    told = r"runs\.down\.data\.sources: none is replayed, but run up, as whose export this one sta"
    refused(tmp_path, told, up=both, down=both)


MEMORY = [{"kind": "questions", "path": "up.jsonl", "domain": "up"}]
GEM = {"method": {"memories": {"kind": "gem"}}, "data": {"memory": MEMORY}}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.memory=null"], r"data\.memory: missing; method\.memories takes rows of it"),
        (["method.memories=null"], r"data\.memory: by these settings method l2kd reads none of it"),
        (["data.memory.0.domain=down"], r"data\.memory\.0\.domain: 'down' is new by data\.sources"),
        (["train.clip=1"], r"train\.clip: 1\.0 would clip what method\.memories has clipped"),
        (["deepspeed=zero3_nvme"], "zero3_nvme: method.memories cannot edit an optimizer on NVMe"),
        (["method.memories.kind=a_gem", "method.memories.ridge=1"], "ridge: of no use to a_gem"),
        (["method.memories.clip=0"], r"method\.memories\.clip: .*greater than 0"),
    ],
)
def test_what_memories_do_not_go_with(tmp_path, words, told):
    checked(recipe(tmp_path, down=GEM))
    refused(tmp_path, told, *(f"runs.down.{word}" for word in words), down=GEM)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.path=null", "model.config={model_type: llama}"],
         r"penalty\.earlier: .* but model\.path is null"),
        (["model.slice={hidden_size: 16}"], r"model\.slice: method\.penalty\.earlier has import"),
        (["deepspeed=zero3_nvme"], "zero3_nvme: method.penalty cannot edit an optimizer on NVMe"),
        (["method.adamw=original", "deepspeed=zero3_nvme", "method.penalty=null"],
         r"zero3_nvme: method\.adamw original cannot edit an optimizer on NVMe"),
        (["method.penalty.kind=si"], r"method\.penalty\.kind: 'si' is not one of ewc, mas"),
    ],
)  # fmt: skip
def test_what_a_penalty_does_not_go_with(tmp_path, words, told):
    runs = {"up": {"method": {"penalty": EWC}}, "down": {"method": EARLIER}}
    checked(recipe(tmp_path, **runs))
    refused(tmp_path, told, *(f"runs.down.{word}" for word in words), **runs)


def test_importances_of_another_model_are_refused_before_the_training(tmp_path, capfd):
    """Those of a run whose export is not what this one starts as."""
    path = recipe(tmp_path, up={"method": {"penalty": EWC}}, down={"method": EARLIER})
    forked(1, str(path), "runs.up.until=importance", "runs.down.until=data")
    shutil.rmtree(tmp_path / "runs" / "down")
    export = tmp_path / "runs" / "up" / "export"
    shutil.copytree(export, tmp_path / "other")
    weights = load_file(export / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    forked(1, str(path), f"runs.down.model.path={tmp_path}/other", status=2)
    told = capfd.readouterr().err
    assert f"{tmp_path}/runs/up/importance/omega.safetensors: made with another model" in told
    assert not (tmp_path / "runs" / "down" / "train").exists()


def test_a_memory_is_read_with_the_rows_and_may_not_change(tmp_path, capfd):
    memory = [{"kind": "questions", "path": str(tmp_path / "memory.jsonl"), "domain": "up"}]
    later = {"data": {"memory": memory}, "method": {"memories": {"kind": "gem"}}}
    path = str(recipe(tmp_path, down=later))
    words = ("runs.up.until=export", "runs.down.until=data")
    forked(1, path, *words, status=2)
    assert f"error: data.memory: questions: {tmp_path}/memory.jsonl: " in capfd.readouterr().err
    lines = (tmp_path / "up.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "memory.jsonl").write_text("".join(lines[:9]))
    forked(1, path, *words)
    (tmp_path / "memory.jsonl").write_text("".join(lines[:8]))
    forked(1, path, status=2)
    assert "down: data.memory changed since the run was started" in capfd.readouterr().err


def test_no_gradient_with_a_loss_scale_is_edited():
    data = {"sources": [{**MEMORY[0], "domain": "down"}], "memory": MEMORY, "questions": TEXTS}
    start = {"data": {"objective": "causal", **data}, "model": {"path": "x"}, "teacher": None}
    run = Run.model_validate({**start, "train": {"precision": "fp16", "clip": 0}})
    penalty = {**EWC, "earlier": "x", "update": "gradient"}
    for setting, name in (
        ({"memories": {"kind": "gem"}}, "memories"),
        ({"penalty": penalty}, "penalty.update gradient"),
    ):
        with pytest.raises(ConfigError, match=f"method.{name} knows no loss scale"):
            build_method({"kind": "l2kd", **setting}).check(run, None)
    decoupled = {**penalty, "update": "decoupled"}
    build_method({"kind": "l2kd", "penalty": decoupled, "adamw": "original"}).check(run, None)
