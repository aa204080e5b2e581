"""What method l2kd does for earlier tasks: which parts it wires, with which numbers, and what is
refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dskd.continual.kept_weights import KeptWeights
from dskd.data.prepared import open_prepared, prepare
from dskd.errors import ConfigError
from dskd.settings.folders import data_settings
from dskd.settings.recipe import SINGLE, read
from dskd.settings.yaml_tree import dump, merge
from tests.data.conftest import all_rows
from tests.data.test_questions import TASKS, data_of
from tests.equivalence import small
from tests.launching import forked
from tests.runs.test_plan import checked

EWC = {"kind": "ewc", "strength": 2.0}


def recipe(folder: Path, **more: Any) -> Path:
    """Two tasks by one method, one after the other; with ``more`` of each run by its name."""
    data = data_of(folder).model_dump(mode="json", include={"objective", "sources", "folder"})
    up, down = data.pop("sources")
    data |= {"validation_fraction": 0.3, "block_size": 32}
    data["questions"] = {"task_tokens": TASKS, "room": 6, "modelling": True}
    base = small.settings(folder) | {"out": str(folder / "runs"), "teacher": None, "data": data}
    base |= {"method": {"kind": "l2kd"}, "until": "importance"}
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
    forked(1, str(path), "train.precision=bf16")
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
    forked(1, str(recipe(tmp_path, up=first, down=merge(first, earlier))))
    out = tmp_path / "runs"
    one, two = (KeptWeights.of(out / name / "importance", {}) for name in ("up", "down"))
    trained = AutoModelForCausalLM.from_pretrained(out / "up" / "export")
    for name, parameter in trained.named_parameters():
        assert not torch.equal(one.anchor.whole(name), parameter)
        assert torch.equal(one.anchor.whole(name), two.anchor.whole(name))
        assert (two.omega.whole(name) >= one.omega.whole(name)).all()
    # The same again does nothing; what was made of something else is refused.
    forked(1, str(recipe(tmp_path, up=first, down=merge(first, earlier))))
