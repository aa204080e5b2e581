"""Runs on rows of questions: what is refused before they start, and what they leave."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.data.preparing import _held_out
from dskd.errors import ConfigError
from dskd.settings.yaml_tree import merge
from tests.data.test_questions import TASKS, data_of
from tests.launching import exported_nll, forked, losses
from tests.runs.test_plan import checked, recipe_of

GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def asked(folder: Path, **questions) -> dict:
    """The settings of a run on two tasks, ``up`` and ``down``."""
    data = data_of(folder).model_dump(
        mode="json", include={"objective", "sources", "validation_fraction"}
    )
    data["questions"] = {"task_tokens": TASKS, "room": 6} | questions
    return {"model": {"config": GPT2}, "data": data}


KI = {
    "method": {"kind": "ki", "steps": 2},
    "teacher": {"kind": "cached", "model": {"config": GPT2}, "k": 8},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"objective": "masked"}, "model": {"config": {"model_type": "bert"}}},
         "data.objective: masked, but rows of questions (data.questions) are for a causal LM"),
        ({"data": {"questions": None}},
         "data.sources.0.kind: its questions need data.questions (`data.questions: {}`)\n"
         "runs.only.data.sources.1.kind: its questions need data.questions (`data.questions: {}`)"),
        ({"data": {"validation": [{"kind": "builtin"}]}},
         "data.validation.0.kind: builtin has no questions; data.questions takes questions and "
         "squad"),
        ({"data": {"validation": [{"kind": "squad", "path": "x", "domain": "upp"}]}},
         "data.questions.task_tokens: no token for the domain 'upp' of data.validation.0; did you "
         "mean 'up'?"),
        ({"data": {"questions": {"answer_token": "__up__"}}},
         "data.questions.answer_token: __up__ is the token of a task, too"),
        ({"data": {"questions": {"room": 31}}},
         "data.questions.room: 31 leaves no token for a question in data.block_size 32"),
        ({"data": {"masking": {"kind": "hard_tokens"}}},
         "data.masking.kind: hard_tokens, but of a question only the answer is learnt"),
        ({"data": {"packing": "contiguous"}},
         "data.packing: a row is one question (data.questions); leave it out"),
        ({"data": {"questions": {"modelling": True}}, **KI},
         "teacher.kind: a cached teacher has one view of a row; data.questions.modelling makes "
         "two"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_the_start(tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"only": merge(asked(tmp_path), changes)}))
    assert str(error.value).startswith(f"runs.only.{message}")


REPLAYED = {"kind": "replayed", "path": "x.jsonl", "domain": "down"}
STORED = {"kind": "pretrained", "path": "somewhere"}


@pytest.mark.parametrize(
    ("replayed", "changes", "messages"),
    [
        ([REPLAYED | {"domain": "up"}], {},
         ["data.sources.1.domain: 'up' is new by data.sources.0; one of the two"]),
        ([REPLAYED, REPLAYED], {},
         ["data.sources.2.domain: 'down' is replayed already by data.sources.1; one of the two"]),
        ([REPLAYED | {"domain": "dow"}], {},
         ["data.questions.task_tokens: no token for the domain 'dow' of data.sources.1; did you "
          "mean 'down'?"]),
        ([REPLAYED | {"domain": "a/b", "path": None}], {},
         ["data.questions.task_tokens: no token for the domain 'a/b' of data.sources.1",
          "data.sources.1.domain: 'a/b' is no name of a file, as which the rows are written",
          "data.sources.1.path: missing; by these settings method lm has no such rows written"]),
        ([REPLAYED], {"validation": [REPLAYED]},
         ["data.validation.0.kind: replayed, but on rows that a model wrote no other is evaluated"
          ]),
        ([REPLAYED], {"tokenizer": {"kind": "trained"}},
         ["data.tokenizer.kind: trained, but data.sources.1 is in the tokens of a model that is "
          "there; pretrained, with the path of its tokenizer"]),
        ([], {"memory": [REPLAYED | {"kind": "questions"}]},
         ["data.memory: by these settings method lm reads none of it; leave it out"]),
    ],
    ids=["new", "twice", "token", "null", "validation", "trained", "memory"],
)  # fmt: skip
def test_replayed_rows_that_do_not_fit_are_refused(tmp_path, replayed, changes, messages):
    run = asked(tmp_path)
    run["data"]["tokenizer"] = STORED
    run["data"]["sources"] = [run["data"]["sources"][0], *replayed]
    with pytest.raises(ConfigError) as error:
        run = merge(merge(run, {"method": {"kind": "lm"}, "teacher": None}), {"data": changes})
        checked(recipe_of(tmp_path, {"only": run}))
    assert str(error.value).split("\n") == [f"runs.only.{message}" for message in messages]


def test_all_rows_replayed_are_refused(tmp_path):
    run = asked(tmp_path) | {"method": {"kind": "lm"}, "teacher": None}
    run["data"] |= {"tokenizer": STORED, "sources": [REPLAYED]}
    with pytest.raises(ConfigError, match="sources: all are replayed; rows of a new task are miss"):
        checked(recipe_of(tmp_path, {"only": run}))


def test_runs_whose_tokens_are_others_are_refused(tmp_path):
    runs = {"first": asked(tmp_path), "second": asked(tmp_path, answer_token="__a__")}
    runs["second"]["model"] = {"path": "run:first"}
    told = r"second\.model\.path: run first has another tokenizer than this run \(data\.questions\)"
    with pytest.raises(ConfigError, match=told):
        checked(recipe_of(tmp_path, runs))


def test_a_cache_of_other_questions_is_refused(tmp_path):
    reads = {"method": KI["method"], "teacher": {"kind": "cached", "path": "run:a"}}
    first = merge(asked(tmp_path), KI)
    checked(recipe_of(tmp_path, {"a": first, "b": merge(asked(tmp_path), reads)}))
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"a": first, "b": merge(asked(tmp_path, room=7), reads)}))
    told = "run a captures it with other rows or masks: data.questions differ"
    assert str(error.value) == f"runs.b.teacher.path: {told}"


def test_a_chain_learns_answers_and_exports_what_huggingface_reads(tmp_path):
    """The second run goes on from the first; both losses, by plain torch, of the rows held out."""
    train = {"train": {"steps": 12, "lr": 0.01}, "evaluation": {"every": 12, "rows": None}}
    train["checkpoint"] = {"every": 12}
    runs = {"first": merge(asked(tmp_path), train), "second": asked(tmp_path, modelling=True)}
    runs["second"]["model"] = {"path": "run:first"}
    runs["second"]["data"]["tokenizer"] = {"kind": "pretrained", "path": "run:first"}
    forked(1, str(recipe_of(tmp_path, runs)), "evaluation.rows=null")
    first, second = (tmp_path / "runs" / name for name in runs)
    found = losses(first)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    for run, modelled in ((first, False), (second, True)):
        model = AutoModelForCausalLM.from_pretrained(run / "export").eval()
        tokenizer = AutoTokenizer.from_pretrained(run / "export", split_special_tokens=True)
        assert exported_nll(run) == pytest.approx(_nll(model, tokenizer, tmp_path, modelled), 1e-5)


def with_new_tokens(folder: Path, **model) -> dict:
    """A plain language model, and a run on questions that starts as it."""
    asking = asked(folder)
    asking["model"] = {"path": "run:plain", **model}
    asking["data"]["tokenizer"] = {"kind": "pretrained", "path": "run:plain"}
    return {"plain": {"model": {"config": GPT2}, "data": {"objective": "causal"}}, "asked": asking}


def test_a_language_model_gets_embeddings_for_the_tokens(tmp_path):
    forked(1, str(recipe_of(tmp_path, with_new_tokens(tmp_path, new_tokens=True))))
    plain, own = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / name / "export")
        for name in ("plain", "asked")
    )
    assert own.config.vocab_size == plain.config.vocab_size + 3 == 323
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "asked" / "export")
    assert tokenizer.convert_tokens_to_ids(["__ans__", "__up__", "__down__"]) == [320, 321, 322]


def test_without_them_it_is_refused_before_the_start(tmp_path):
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, with_new_tokens(tmp_path)))
    assert str(error.value) == (
        "runs.asked.model.path: run plain has no token __ans__ (data.questions); a student gets "
        "embeddings for such tokens by model.new_tokens: true"
    )


def _nll(model, tokenizer, folder: Path, modelled: bool) -> float:
    """The mean loss of what is learnt of the rows held out."""
    nll = []
    for domain, token in TASKS.items():
        for line in (folder / f"{domain}.jsonl").read_text().splitlines():
            values = json.loads(line)
            if not _held_out(f"{values['context']}\n{values['question']}", 0.3):
                continue
            parts = [tokenizer(values[n]).input_ids[1:] for n in ("context", "question", "answer")]
            parts[0] = parts[0][: 32 - len(parts[1]) - 1 - max(6, len(parts[2]) + 1)]
            ans, task = tokenizer.convert_tokens_to_ids(["__ans__", token])
            row = [*parts[0], *parts[1], ans, *parts[2], tokenizer.eos_token_id]
            nll += _losses(model, row[:-1], row[1:])[row.index(ans) :]
            if modelled:
                nll += _losses(model, [task, *row[:-1]], row)
    return sum(nll) / len(nll)


def _losses(model, inputs: list[int], labels: list[int]) -> list[float]:
    with torch.no_grad():
        logits_TV = model(torch.tensor([inputs])).logits[0]
    losses_T = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(labels), reduction="none")
    return losses_T.tolist()
