"""Tasks one after the other, where each replays the ones before, and a model that learns from the
answers of another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.data.preparing import training_questions
from dskd.errors import ConfigError, StoreError
from dskd.methods.base import build_method
from dskd.runs.context import RunContext
from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.settings.yaml_tree import merge
from dskd.system import rows_file
from tests.faults.runs import die
from tests.launching import forked, losses
from tests.ranks import run_ranks
from tests.runs.test_plan import checked, recipe_of
from tests.runs.test_question_runs import asked

LEARNT = {"train": {"steps": 100, "batch": 16, "micro_batch": 16, "lr": 0.01}}
SHORT = {"train": {"steps": None, "epochs": 1}}
NEVER = {"evaluation": {"every": 100}, "checkpoint": {"every": 100}}


def chain(folder: Path) -> Path:
    """``up`` is learnt, and its model answers; ``down`` replays it, in runs of their own from its
    samples, from all earlier questions; ``seq`` learns what ``up`` answers."""
    both = asked(folder, modelling=True)
    up, down = both["data"].pop("sources")
    first = merge(both, {"data": {"sources": [up]}, "method": {"kind": "l2kd", "distil": {}}})
    later = merge(both, {"model": {"config": None, "path": "run:up"}})
    later["model"] = {"path": "run:up"}
    later["data"]["tokenizer"] = {"kind": "pretrained", "path": "run:up"}
    replayed = {"kind": "replayed", "domain": "up"}
    lll = {"data": {"sources": [down, replayed]}, "method": {"kind": "l2kd", "replay": {}}}
    real = merge(lll, {"method": {"replay": {"real": True}}, "data": {"memory": [up]}})
    seq = {"data": {"sources": [up | {"path": "run:up"}], "validation": [up]}}
    seq["method"] = {"kind": "l2kd"}
    runs = {
        "up": merge(first, LEARNT | NEVER),
        "down": merge(later, lll | SHORT | NEVER),
        "real": merge(later, real | SHORT | NEVER),
        "seq": merge(later, seq | SHORT | NEVER),
    }
    return recipe_of(folder, runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    forked(1, str(chain(folder)))
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_next_task_replays_what_the_model_writes(folder):
    new = len(list(training_questions(read(chain(folder)).runs["down"].data)))
    out, real = folder / "runs" / "down", folder / "runs" / "real"
    asked_for = -(-new // 5)
    told = json.loads((out / "replay" / "summary.json").read_text())["tasks"]["up"]
    rows = lines(out / "replay" / "up.jsonl")
    assert told["asked"] == told["written"] == len(rows) == asked_for
    assert told["samples"] < 3 * asked_for  # it has learnt to write them
    assert len(lines(real / "replay" / "up.jsonl")) == asked_for
    assert len(losses(out)) == -(-(new + asked_for) // 4)
    report = (folder / "runs" / "report.html").read_text()
    assert f"{asked_for / told['samples']:.1%} of {told['samples']}" in report


def test_an_exported_model_answers_its_questions(folder):
    """Against HuggingFace's own greedy search, question by question."""
    out = folder / "runs" / "up"
    given = [question for _, question in training_questions(read(chain(folder)).runs["up"].data)]
    found = lines(out / "distilled.jsonl")
    assert [(row["context"], row["question"]) for row in found] == [
        (question.context, question.text) for question in given
    ]
    tokenizer = AutoTokenizer.from_pretrained(out / "export", split_special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(out / "export").eval()
    ans, end = tokenizer.convert_tokens_to_ids("__ans__"), tokenizer.eos_token_id
    for row in found[::5]:
        context, question = (tokenizer(row[n]).input_ids[1:] for n in ("context", "question"))
        prompt = [*context[: 32 - len(question) - 1 - 6], *question, ans]
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), max_length=32, do_sample=False, eos_token_id=end,
                pad_token_id=1,
            )[0, len(prompt) :].tolist()  # fmt: skip
        ids = ids[: ids.index(end)] if end in ids else ids
        assert row["answer"] == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    right = sum(r["answer"] == q.answers[0] for r, q in zip(found, given, strict=True))
    assert right > len(given) // 4
    assert (folder / "runs" / "seq" / "scores.json").exists()


def test_what_is_done_is_not_done_again(folder):
    places = [*folder.glob("runs/*/replay/*"), *folder.glob("runs/*/distilled.jsonl*")]
    assert len(places) == 3 + 3 + 2
    before = [place.stat().st_mtime_ns for place in places]
    forked(1, str(chain(folder)))
    assert [place.stat().st_mtime_ns for place in places] == before


def answering(folder: Path, name: str, **changes) -> Run:
    """A run that has exported what ``up`` has, and answers by other settings."""
    run = read(chain(folder)).runs["up"]
    out = folder / name
    shutil.copytree(run.out / "export", out / "export")
    return Run.model_validate(run.model_dump() | {"out": out, "seed": 8} | changes)


def answered(rank: int, run: Run) -> list[dict]:
    method = build_method(run.method)
    distil = method.stages()[-1]
    assert (distil.name, distil.before, distil.whole) == ("distil", "evaluate", "distilled.jsonl")
    distil.run(RunContext(run, method, torch.device("cpu")))
    return lines(run.out / "distilled.jsonl")


@pytest.mark.parametrize("distil", [{}, {"top_k": 20}], ids=["greedy", "drawn"])
def test_answers_are_the_same_by_any_batch_ranks_and_sharding(folder, distil):
    name, how = f"answers{len(distil)}", {"method": {"kind": "l2kd", "distil": distil}}
    wanted = answered(0, answering(folder, name, **how))
    greedy = lines(folder / "runs" / "up" / "distilled.jsonl")
    assert (wanted == greedy) is not bool(distil)
    how |= {"evaluation": {"micro_batch": 3}, "train": {**LEARNT["train"], "micro_batch": 8}}
    assert answered(0, answering(folder, f"{name}-few", **how)) == wanted
    for stage in ("zero0", "zero3"):
        run = answering(folder, f"{name}-{stage}", deepspeed=stage, **how)
        assert run_ranks(answered, run) == [wanted, wanted]


def _killed(rank: int, run: Run) -> None:
    plain, calls = rows_file.write_all, 0

    def half(stream, data):
        nonlocal calls
        calls += 1
        if calls == 2:
            plain(stream, data[:-2])
            die()
        plain(stream, data)

    rows_file.write_all = half
    answered(0, run)


def test_killed_in_the_middle_of_an_answer_it_goes_on(folder):
    run = answering(folder, "killed", evaluation={"micro_batch": 2})
    part = run.out / "distilled.jsonl.part"
    for _ in range(2):
        with pytest.raises(AssertionError, match="died with exit status"):
            run_ranks(_killed, run, world=1)
        assert part.exists() and not part.read_bytes().endswith(b"\n")
    assert answered(0, run) == lines(folder / "runs" / "up" / "distilled.jsonl")


def test_answers_of_another_export_are_refused(folder):
    run = answering(folder, "exported-anew")
    answered(0, run)
    shutil.rmtree(run.out / "export")
    shutil.copytree(folder / "runs" / "down" / "export", run.out / "export")
    with pytest.raises(StoreError, match=r"distilled\.jsonl was made otherwise \(model: .*; rem"):
        answered(0, run)


def test_other_settings_are_refused(folder):
    for words in (["runs.down.method.replay.share=0.3"], ["runs.up.method.distil.top_k=5"]):
        with pytest.raises(ConfigError, match=r"was started with other settings:\n  method\."):
            checked(chain(folder), *words)


def test_a_tokenizer_trained_on_answers_to_come_is_another(tmp_path):
    told = r"seq\.model\.path: run up has another tokenizer than this run \(.*data\.sources"
    with pytest.raises(ConfigError, match=told):
        checked(chain(tmp_path), "runs.seq.data.tokenizer={kind: trained}")


def test_answers_that_are_there_are_read(folder):
    checked(chain(folder), "until=train")


def test_answers_of_which_no_row_can_be_held_out_are_refused(tmp_path):
    told = r"^runs\.seq\.data\.validation: missing; run up holds out rows by itself, and its"
    with pytest.raises(ConfigError, match=told):
        checked(chain(tmp_path), "runs.seq.data.validation=null")
    more = "runs.seq.data.validation_fraction=0.5"  # up: 0.3
    checked(chain(tmp_path), "runs.seq.data.validation=null", more)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs.up.method.distil=null"], "by its settings run up writes no answers of its model"),
        (["runs.up.until=export"], r"run up writes no answers of its model \(distilled\.jsonl\)"),
        ([f"runs.seq.data.sources.0.path={'{out}'}/runs/seq/distilled.jsonl"],
         "is what this run itself writes in its end"),
        (["runs.seq.data.sources.0.path=x", "runs.seq.evaluation.sets={a: {sources: [{kind: "
          "questions, path: 'run:down', domain: up}]}}"],
         "by its settings run down writes no answers of its model"),
    ],
    ids=["null", "until", "itself", "set"],
)  # fmt: skip
def test_answers_that_no_run_writes_are_refused(tmp_path, words, told):
    words = [word.replace("{out}", str(tmp_path)) for word in words]
    with pytest.raises(ConfigError, match=rf"^runs\.seq\.\S+\.sources\.0\.path: .*{told}"):
        checked(chain(tmp_path), *words)
