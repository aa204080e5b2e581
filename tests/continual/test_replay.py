"""Rows of earlier tasks that a model writes: which they are, whatever writes them and however often
that is stopped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dskd.continual import replay
from dskd.continual.replay import Replay, drawn_questions, replay_section, rows_of_each
from dskd.data.layouts import layout_of, task_ids
from dskd.data.questions import Question, questions
from dskd.data.tokenizers import load_tokenizer
from dskd.errors import ConfigError, DataError, StoreError
from dskd.methods.base import build_method
from dskd.models.generate import Decoding, Sampling, continuations
from dskd.runs.context import RunContext
from dskd.settings.data import Data, PretrainedTokenizer
from dskd.settings.examples import Questions
from dskd.settings.folders import RunFolder
from dskd.settings.run import Run
from dskd.system import rows_file
from tests.data import test_questions
from tests.data.test_questions import opened
from tests.faults.runs import die
from tests.goldens import golden
from tests.ranks import run_ranks

TASKS = test_questions.TASKS | {"more": "__more__"}
OF = Questions(task_tokens=TASKS, room=6, modelling=True)
SETTINGS = {"share": 0.25, "top_k": None, "rounds": 60}
"""By these a model that has learnt nothing writes some well-formed rows of many."""


def data_of(folder: Path, **changes) -> Data:
    """Questions of two tasks, where three have tokens."""
    return test_questions.data_of(folder, questions=OF, **changes)


def stored_tokenizer(folder: Path) -> PretrainedTokenizer:
    return PretrainedTokenizer(
        kind="pretrained", path=str(opened(data_of(folder)).folder / "tokenizer")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Questions of both tasks, a tokenizer, and a model in ``model/``."""
    folder = tmp_path_factory.mktemp("replay")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_positions=40, n_embd=32, n_layer=1, n_head=4, initializer_range=0.3,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    tokenizer = load_tokenizer(data_of(folder, tokenizer=stored_tokenizer(folder)), ())
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def run_of(folder: Path, name: str, *, memory: bool = False, **changes) -> Run:
    """``up`` is new, ``down`` is replayed."""
    data = data_of(folder, tokenizer=stored_tokenizer(folder)).model_dump(mode="json")
    if memory:
        data["memory"] = [data["sources"][1]]
    data["sources"][1] = {"kind": "replayed", "domain": "down"}
    tree = {
        "out": str(folder / name), "seed": 3, "deepspeed": "zero0", "data": data, "teacher": None,
        "model": {"path": str(folder / "model")}, "method": {"kind": "l2kd", "replay": SETTINGS},
        "train": {"precision": "fp32", "batch": 8, "micro_batch": 4},
        "evaluation": {"micro_batch": 32},
    }  # fmt: skip
    return Run.model_validate(tree | changes)


def write(run: Run, **settings) -> list[dict]:
    """The rows that the stage writes."""
    own = run.method["replay"] | settings
    run = run.model_copy(update={"method": run.method | {"replay": own}})
    method = build_method(run.method)
    method.check(run, None)
    (stage,) = method.stages()
    assert stage.wanted(run)
    stage.run(RunContext(run, method, torch.device("cpu")))
    return rows_in(run.out / "replay" / "down.jsonl")


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(folder) -> list[dict]:
    return write(run_of(folder, "one"))


def test_as_many_rows_as_in_the_original():
    (case,) = golden("l2kd_counts")["cases"]
    found = [rows_of_each(*row) for row in case["inputs"]["rows"]]
    assert found == [each for each, _ in case["expected"]]
    tasks = [row[2] for row in case["inputs"]["rows"]]
    assert [n * k for n, k in zip(found, tasks, strict=True)] == [n for _, n in case["expected"]]


def test_the_first_well_formed_samples_are_taken_in_order(folder, written, capsys):
    """Against one sample after the other."""
    run = run_of(folder, "one")
    data = run.data
    tokenizer = load_tokenizer(data, ())
    layout, prompt = layout_of(data, tokenizer), task_ids(data, tokenizer)[1]
    assert prompt == tokenizer.convert_tokens_to_ids("__down__")
    decoding = Decoding(40, 40, 320, (2,), 1, Sampling(seed=3))
    model = GPT2LMHeadModel.from_pretrained(folder / "model")
    asked, wanted, number = len(written), [], 0
    while len(wanted) < asked:
        (ids,) = continuations(model, [[prompt]], decoding, numbers=[(1 << 32) + number], batch=1)
        row = layout.parsed(ids)
        if row is not None:
            wanted.append({"ids": row, "sample": number})
        number += 1
    assert written == wanted
    summary = json.loads((run.out / "replay" / "summary.json").read_text())["tasks"]
    assert summary == {
        "down": {"asked": asked, "written": asked, "samples": number, "well_formed": asked / number}
    }
    new = sum(1 for _ in replay.training_questions(data))
    assert asked == -(-new // 4) and number > 2 * asked
    html = replay_section({"one": RunFolder(run.out), "none": RunFolder(folder / "none")})
    cells = ["one", "down", asked, asked, f"{asked / number:.1%} of {number}"]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in html
    assert replay_section({"none": RunFolder(folder / "none")}) == ""


def test_the_run_reads_them(folder, written):
    run = run_of(folder, "one")
    prepared = RunContext(run, build_method(run.method), torch.device("cpu")).prepared
    down = prepared.train.domains_B(np.arange(len(prepared.train))) == 1
    assert down.sum() == len(written) and not prepared.validation.domains_B(np.arange(3)).any()
    rows = prepared.train.rows(np.flatnonzero(down), np.zeros(down.sum(), np.int64))
    for row, length, ids in zip(written, rows.lengths_B, rows.tokens_BT, strict=True):
        assert ids[:length].tolist() == row["ids"]


def test_any_batch_writes_the_same(folder, written):
    assert write(run_of(folder, "batch", evaluation={"micro_batch": 5})) == written


def test_each_earlier_task_gets_its_share(folder, written):
    """Behind its own token, each by draws of its own."""
    run = run_of(folder, "two")
    more = run.data.sources[1].model_copy(update={"domain": "more"})
    data = run.data.model_copy(update={"sources": [*run.data.sources, more]})
    rows = write(run.model_copy(update={"data": data}))
    others = rows_in(run.out / "replay" / "more.jsonl")
    assert rows == written[: len(written) // 2] and len(others) == len(rows)
    assert others != rows and [row["sample"] for row in others] != [row["sample"] for row in rows]
    summary = json.loads((run.out / "replay" / "summary.json").read_text())["tasks"]
    assert list(summary) == ["down", "more"]
    assert summary["more"]["samples"] == others[-1]["sample"] + 1


def _on_a_rank(rank: int, run: Run) -> list[dict]:
    return write(run)


@pytest.mark.parametrize("deepspeed", ["zero0", "zero3"])
def test_any_number_of_ranks_and_sharding_writes_the_same(folder, written, deepspeed):
    run = run_of(folder, deepspeed, deepspeed=deepspeed, evaluation={"micro_batch": 16})
    assert run_ranks(_on_a_rank, run) == [written, written]


def _killed(rank: int, run: Run, call: int) -> None:
    plain, calls = rows_file.write_all, 0

    def half(stream, data):
        nonlocal calls
        calls += bool(data)
        if calls == call and data:
            plain(stream, data[:-2])
            die()
        plain(stream, data)

    rows_file.write_all = half
    write(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_anywhere_it_goes_on_to_the_same(folder, written, monkeypatch, precision):
    geometry = {"micro_batch": 4, "batch": 8, "precision": precision}
    how = {"evaluation": {"micro_batch": 4}, "train": geometry}
    plain = run_of(folder, f"plain-{precision}", **how)
    wanted = write(plain)
    assert (wanted == written) is (precision == "fp32")
    run = run_of(folder, f"killed-{precision}", **how)
    part = run.out / "replay" / "down.jsonl.part"
    for call in (1, 2, 2):
        with pytest.raises(AssertionError, match="died with exit status"):
            run_ranks(_killed, run, call, world=1)
        assert not part.read_bytes().endswith(b"\n")
    begun = [json.loads(line) for line in part.read_bytes().split(b"\n")[:-1]]
    assert 0 < len(begun) < len(wanted) and begun == wanted[: len(begun)]
    # and between the last row and the summary
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(replay, "write_manifest", _interrupted)
        write(run)
    monkeypatch.setattr(replay, "continuations", _interrupted)  # nothing is written again
    assert write(run) == wanted
    summary = run.out / "replay" / "summary.json"
    assert summary.read_bytes() == (plain.out / "replay" / "summary.json").read_bytes()


def _interrupted(*parts, **named):
    raise KeyboardInterrupt


def test_what_was_made_otherwise_is_refused(folder, written):
    run = run_of(folder, "other")
    write(run)
    with pytest.raises(
        StoreError, match=r"down\.jsonl was made otherwise \(method\.replay: .*; re"
    ):
        write(run, temperature=2.0)
    path = run.out / "replay" / "down.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(StoreError, match=r"down\.jsonl: damaged, its rows are no samples in their"):
        write(run)


def test_a_model_that_is_another_since_is_refused(folder, written):
    """Before there are rows that could tell it."""
    shutil.copytree(folder / "model", folder / "model-2")
    run = run_of(folder, "since", model={"path": str(folder / "model-2")})
    assert write(run) == written
    with torch.no_grad():
        model = GPT2LMHeadModel.from_pretrained(folder / "model-2")
        model.transformer.ln_f.bias += 1
    model.save_pretrained(folder / "model-2")
    with pytest.raises(StoreError, match=r"down\.jsonl was made otherwise \(model: .*; re"):
        write(run)
    (run.out / "inputs.json").touch()  # which tells of the model and of the rows from then on
    assert write(run) == written


def test_too_few_well_formed_ones_are_said(folder, written, capsys):
    few = write(run_of(folder, "few"), rounds=2)
    assert 0 < len(few) < len(written) and few == written[: len(few)]
    told, samples = capsys.readouterr().out, 2 * len(written)
    assert (
        f"warning: method.replay.rounds: 2: of {samples} samples of the task 'down' {len(few)} are "
        f"well-formed, {len(written)} were asked for\n"
    ) in told
    assert (
        f"replay: {len(few)} rows of down, {len(few) / samples:.1%} of {samples} samples well"
        in told
    )


def test_no_well_formed_sample_is_an_error(folder):
    with pytest.raises(DataError, match=r"of \d+ samples of the task 'down' none is well-formed"):
        write(run_of(folder, "zero"), top_k=1, rounds=1)


def test_less_than_a_row_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"share: 0\.01 of \d+ new rows are less than one for ea"):
        run = run_of(folder, "less")
        sources = [*run.data.sources, run.data.sources[1].model_copy(update={"domain": "more"})]
        data = run.data.model_copy(update={"sources": sources})
        write(run.model_copy(update={"data": data}), share=0.01)


def test_real_rows_come_again_only_once_all_have(folder):
    run = run_of(folder, "real", memory=True)
    rows = write(run, real=True)
    gold = [
        {"context": q.context, "question": q.text, "answer": q.answers[0]}
        for q in questions(data_of(folder).sources[1])
    ]
    asked = rows_of_each(sum(1 for _ in replay.training_questions(run.data)), 0.25, 1)
    assert len(rows) == asked < len(gold) and all(row in gold for row in rows)
    assert len({json.dumps(row) for row in rows}) == asked
    other = run_of(folder, "real-4", memory=True).model_copy(update={"seed": 4})
    assert write(other, real=True) != rows
    assert replay_section({"real": RunFolder(run.out)}).count("<td>-</td>") == 1
    every = [Question("", str(n), ("",), None, "") for n in range(5)]
    found = [q.text for q in drawn_questions(every, 13, 3, 1)]
    assert found[:10] == list("01234") * 2 and len(set(found[10:])) == 3
    assert found[10:] == sorted(found[10:])


@pytest.mark.parametrize(
    ("change", "replay_settings", "told"),
    [
        ({"path": "x.jsonl"}, {}, r"method\.replay: every replayed source has a path"),
        ({}, {"real": True}, r"data\.memory: no questions of 'down' \(method\.replay\.real\)"),
        ({"model": {"config": {"model_type": "gpt2"}}}, {}, r"model\.path: missing; by method\.re"),
        ({"model": {"path": "x", "slice": {"hidden_size": 16}}}, {}, r"model\.slice: by method\.r"),
    ],
)
def test_what_cannot_be_replayed_is_refused(folder, change, replay_settings, told):
    given = {"model": change["model"]} if "model" in change else {}
    run = run_of(folder, "refused", **given)
    if "path" in change:
        source = run.data.sources[1].model_copy(update=change)
        data = run.data.model_copy(update={"sources": [run.data.sources[0], source]})
        run = run.model_copy(update={"data": data})
    method = build_method({"kind": "l2kd", "replay": Replay(**replay_settings).model_dump()})
    with pytest.raises(ConfigError, match=told):
        method.check(run, None)


@pytest.mark.parametrize("domain", ["more", "up"])
def test_a_memory_that_nothing_is_taken_from_is_refused(folder, domain):
    run = run_of(folder, "idle", memory=True)
    memory = [*run.data.memory, run.data.memory[0].model_copy(update={"domain": domain})]
    run = run.model_copy(update={"data": run.data.model_copy(update={"memory": memory})})
    real = build_method({"kind": "l2kd", "replay": {"real": True}})
    with pytest.raises(ConfigError, match=rf"^data\.memory\.1\.domain: no rows of '{domain}' are"):
        real.check(run, None)


def test_a_first_task_replays_nothing(folder):
    run = run_of(folder, "first")
    run = run.model_copy(update={"data": data_of(folder)})
    method = build_method(run.method)
    (stage,) = method.stages()
    assert not stage.wanted(run)
    stage.run(RunContext(run, method, torch.device("cpu")))
    assert not run.out.exists()
