"""Recipes of tasks: the runs that they are written out as, overrides, and what is refused."""

import pytest

from dskd.errors import ConfigError
from dskd.settings import sequence, yaml_tree
from dskd.settings.recipe import read

RECIPE = """
base:
  out: runs/toys
  method: {kind: l2kd, text_weight: 0.25}
  model: {path: gpt2, new_tokens: true, attention: eager, config: {n_layer: 2}}
  teacher: null
  data: {objective: causal, tokenizer: {kind: pretrained, path: gpt2}, questions: {modelling: true}}
  evaluation: {select: last}
tasks:
  rev:
    sources: [{kind: questions, path: rev.jsonl}]
    test: {sources: [{kind: questions, path: rev-test.jsonl}], metric: em}
  maj:
    sources: [{kind: questions, path: maj.jsonl, domain: maj}]
    validation: [{kind: questions, path: maj-dev.jsonl}]
    test: {sources: [{kind: questions, path: maj-test.jsonl}], metric: nf1, rows: 9}
sequences:
  lll: {method: {replay: {share: 0.2}}}
"""

HELD_OUT = "    validation: [{kind: questions, path: maj-dev.jsonl}]\n"


def of(task, part="", **more):
    return {"kind": "questions", "path": f"{task}{part}.jsonl", "domain": task, **more}


SETS = {
    "rev": {"sources": [of("rev", "-test")], "metric": "em"},
    "maj": {"sources": [of("maj", "-test")], "metric": "nf1", "rows": 9},
}


def expanded(text=RECIPE, *overrides):
    """The runs and what is left of the overrides; ``text`` of :data:`RECIPE` or a change of it."""
    content, left = sequence.written_out(
        yaml_tree._parse(text, "a.yaml"), yaml_tree.overlay(overrides), "a.yaml"
    )
    assert content.keys() == {"base", "runs"} and content["base"] == {"out": "runs/toys"}
    return content["runs"], left


def with_sequences(*lines, teachers=False):
    head = RECIPE[: RECIPE.index("sequences:")]
    head += "teachers: {method: {distil: {}}, seed: 5}\n" if teachers else ""
    return head + "sequences:\n" + "".join(f"  {line}\n" for line in lines)


def refused(text, *overrides):
    with pytest.raises(ConfigError) as caught:
        expanded(text, *overrides)
    return str(caught.value).splitlines()


# What a sequence becomes


def test_a_run_a_task_each_from_the_one_before():
    runs, left = expanded()
    assert left == {} and list(runs) == ["rev", "maj"]
    shared = {
        "teacher": None,
        "method": {"kind": "l2kd", "text_weight": 0.25, "replay": {"share": 0.2}},
        "evaluation": {"select": "last", "sets": SETS},
    }
    data = {
        "objective": "causal",
        "tokenizer": {"kind": "pretrained", "path": "gpt2"},
        "questions": {"modelling": True},
    }
    model = {"path": "gpt2", "new_tokens": True, "attention": "eager", "config": {"n_layer": 2}}
    assert runs["rev"] == {**shared, "data": data | {"sources": [of("rev")]}, "model": model}
    assert runs["maj"] == {
        **shared,
        "data": data | {"sources": [of("maj")], "validation": [of("maj", "-dev")]},
        "model": {"path": "run:rev", "attention": "eager"},
    }


def test_further_sequences_are_named_and_start_again():
    text = with_sequences("lll:", "back: {order: [maj, rev]}", "both: {together: true}")
    runs, _ = expanded(text.replace(HELD_OUT, ""))
    assert list(runs) == ["rev", "maj", "back-maj", "back-rev", "both"]
    assert runs["back-maj"]["model"] == runs["both"]["model"] == runs["rev"]["model"]
    assert runs["back-rev"]["model"]["path"] == "run:back-maj"
    assert runs["both"]["data"]["sources"] == [of("rev"), of("maj")]
    assert [run["evaluation"]["sets"] for run in runs.values()] == [SETS] * 5


@pytest.mark.parametrize(
    ("earlier", "replayed", "memory"),
    [("none", False, False), ("replayed", True, False), ("memory", False, True),
     ("real", True, True)],
)  # fmt: skip
def test_what_a_run_has_of_earlier_tasks(earlier, replayed, memory):
    third = "  shift: {sources: [{kind: questions, path: shift.jsonl}], test: {sources: [{}]}}\n"
    text = with_sequences(f"lll: {{earlier: {earlier}}}").replace("tasks:\n", "tasks:\n" + third)
    runs, _ = expanded(text)
    before = ["shift", "rev"]
    copies = [{"kind": "replayed", "domain": task} for task in before] if replayed else []
    assert runs["maj"]["data"]["sources"] == [of("maj"), *copies]
    assert runs["maj"]["data"].get("memory") == ([of(task) for task in before] if memory else None)
    assert (
        runs["shift"]["data"]["sources"] == [of("shift")] and "memory" not in runs["shift"]["data"]
    )


def test_teachers_are_made_once_before_what_they_teach():
    text = with_sequences(
        "plain:", "word: {teacher: true}", "soft: {teacher: true, distilled: true}",
        "all: {together: true, distilled: true}", teachers=True,
    )  # fmt: skip
    runs, _ = expanded(text.replace(HELD_OUT, ""))
    assert list(runs) == [
        "rev", "maj", "rev-teacher", "word-rev", "maj-teacher", "word-maj", "soft-rev", "soft-maj",
        "all",
    ]  # fmt: skip
    teacher = runs["maj-teacher"]
    assert teacher["seed"] == 5 and teacher["method"] == {
        "kind": "l2kd", "text_weight": 0.25, "distil": {},
    }  # fmt: skip
    assert teacher["model"] == runs["rev"]["model"] and teacher["teacher"] is None
    assert teacher["evaluation"]["sets"] == {"maj": SETS["maj"]}
    assert teacher["data"] == runs["maj"]["data"]
    live = {"kind": "live", "model": {"path": "run:maj-teacher"}}
    assert runs["word-maj"]["teacher"] == runs["soft-maj"]["teacher"] == live
    answered = [
        {"kind": "questions", "path": f"run:{task}-teacher", "domain": task}
        for task in ("rev", "maj")
    ]
    assert runs["soft-maj"]["data"]["sources"] == answered[1:]
    assert runs["word-maj"]["data"]["sources"] == [of("maj")]
    assert runs["all"]["data"]["sources"] == answered and runs["all"]["teacher"] is None


def test_validation_of_tasks_together():
    text = with_sequences("both: {together: true}").replace(
        "  maj:", HELD_OUT.replace("maj", "rev") + "  maj:"
    )
    assert expanded(text)[0]["both"]["data"]["validation"] == [of("rev", "-dev"), of("maj", "-dev")]


def test_the_run_before():
    penalty = "penalty: {kind: ewc, earlier: run:previous}"
    runs, _ = expanded(
        with_sequences("lll:", f"ewc: {{method: {{{penalty}, list: [run:previous, x]}}}}")
    )
    assert runs["ewc-rev"]["method"]["penalty"] == {"kind": "ewc", "earlier": None}
    assert runs["ewc-maj"]["method"]["penalty"]["earlier"] == "run:ewc-rev"
    assert runs["ewc-maj"]["method"]["list"] == ["run:ewc-rev", "x"]


def test_settings_of_all_runs_but_the_first():
    later = "later: {method: {memories: {kind: gem}}, train: {clip: 0}}"
    runs, _ = expanded(with_sequences(f"gem: {{method: {{text_weight: 0}}, {later}}}"))
    assert runs["rev"]["method"] == {"kind": "l2kd", "text_weight": 0}
    assert "train" not in runs["rev"] and runs["maj"]["train"] == {"clip": 0}
    assert runs["maj"]["method"] == runs["rev"]["method"] | {"memories": {"kind": "gem"}}


def test_what_a_live_teacher_is_besides_a_run():
    later = "later: {teacher: {precision: bf16, model: {attention: eager}}}"
    text = with_sequences(f"word: {{teacher: true, {later}}}", teachers=True)
    base = "teacher: {kind: live, precision: fp32, deepspeed: zero3, model: {path: x}}"
    runs, _ = expanded(text.replace("teacher: null", base))
    shared = {"kind": "live", "deepspeed": "zero3"}
    assert runs["rev"]["teacher"] == {
        **shared, "precision": "fp32", "model": {"path": "run:rev-teacher"},
    }  # fmt: skip
    model = {"path": "run:maj-teacher", "attention": "eager"}
    assert runs["maj"]["teacher"] == {**shared, "precision": "bf16", "model": model}


def test_the_first_run_trains_the_tokenizer():
    trained = "tokenizer: {kind: trained, vocab_size: 400}"
    text = RECIPE.replace("tokenizer: {kind: pretrained, path: gpt2}", trained)
    runs, left = expanded(text + "runs:\n  after: {seed: 3}\n", "data.tokenizer.vocab_size=500")
    assert left == {}
    assert runs["rev"]["data"]["tokenizer"] == {"kind": "trained", "vocab_size": 500}
    read_by_others = {"kind": "pretrained", "path": "run:rev"}
    for name in ("maj", "after"):
        assert runs[name]["data"]["tokenizer"] == read_by_others
    assert runs["after"]["seed"] == 3 and "sources" not in runs["after"]["data"]


# Overrides


def test_overrides_before_and_after():
    over = [
        "tasks.rev.sources.0.documents=7", "sequences.lll.method.replay.share=0.5",
        "model.path=distilgpt2", "train.lr=1", "runs.maj.seed=2", "data.block_size=8",
    ]  # fmt: skip
    runs, left = expanded(RECIPE, *over)
    assert runs["rev"]["data"]["sources"] == [of("rev", documents=7)]
    assert runs["maj"]["method"]["replay"] == {"share": 0.5}
    assert runs["rev"]["model"]["path"] == "distilgpt2"
    assert runs["maj"]["model"]["path"] == "run:rev"
    assert left == {
        "train": {"lr": 1}, "runs": {"maj": {"seed": 2}}, "data": {"block_size": 8},
    }  # fmt: skip


def test_a_model_of_all_runs_is_that_of_runs_beside_the_tasks_too():
    text = RECIPE + "runs:\n  a: {model: {path: other}}\n  b: {model: {path: 'run:maj'}}\n  c:\n"
    runs, _ = expanded(text, "model.path=x")
    assert [runs[name]["model"]["path"] for name in "abc"] == ["x", "run:maj", "x"]


def test_mistakes_of_its_runs_are_those_of_any_recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(RECIPE.replace(", questions: {mod", ", x: {mod"))
    with pytest.raises(ConfigError) as caught:
        read(path, ["runs.mja.seed=2", "out=/o"])
    lines = str(caught.value).replace(f"{path}", "FILE").splitlines()
    assert "command line: runs.mja: no such run; did you mean 'maj'?" in lines
    assert any(line.startswith("FILE: data.x: no such setting") for line in lines)


# Mistakes


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("test: {sources: [{kind: questions, path: rev-test.jsonl}], metric: em}",
          "test: {metric: em}"),
         "tasks.rev.test.sources: missing; what the models of a sequence are scored on"),
        (("    test: {sources: [{kind: questions, path: rev-test.jsonl}], metric: em}\n", ""),
         "tasks.rev.test: missing"),
        (("path: maj.jsonl, domain: maj", "path: maj.jsonl, domain: may"),
         "tasks.maj.sources.0.domain: 'may', but the rows of a task are of the domain of its name"),
        (("    sources: [{kind: questions, path: rev.jsonl}]", "    source: []"),
         "tasks.rev.source: no such setting; did you mean 'sources'?"),
        (("  rev:", "  r.v:"), "tasks.r.v: such a name is made of letters, digits, _ and -"),
        (("  rev:", "  previous:"),
         "tasks.previous: run:previous is the run before; take another name"),
        (("  lll: {method", "  rev: {method"), "sequences.rev: a task has this name, too"),
        (("lll: {method", "lll: {order: [maj, rec], method"),
         "sequences.lll.order: no task is named 'rec'; did you mean 'rev'?"),
        (("lll: {method", "lll: {order: [maj, maj], method"),
         "sequences.lll.order: 'maj' is named twice"),
        (("lll: {method", "lll: {earlier: replay, method"),
         "sequences.lll.earlier: 'replay' is not one of none, replayed, memory, real"),
        (("lll: {method", "lll: {methd"),
         "sequences.lll.methd: no such setting; did you mean 'method'?"),
        (("lll: {method", "lll: {later: {model: {path: x, attention: sdpa}}, method"),
         "sequences.lll.later.model.path: this model is the export of the run before; only "
         "attention, trust_remote_code may be set"),
        (("lll: {method", "lll: {teacher: true, later: {teacher: {kind: cached}}, method"),
         "sequences.lll.later.teacher: with `teacher: true` it is live; expected settings (name: "
         "value) of that"),
        (("lll: {method", "lll: {teacher: true, later: {teacher: {model: {path: x}}}, method"),
         "sequences.lll.later.teacher.model.path: this model is the export of the run TASK-teacher;"
         " only attention, trust_remote_code may be set"),
        (("lll: {method", "lll: {teacher: true, method"),
         "sequences.lll.teacher: true, but the recipe has no `teachers: {...}`, the settings of "
         "their runs"),
        (("lll: {method", "lll: {teacher: {kind: live}, method"),
         "sequences.lll.teacher: expected true or false, found {'kind': 'live'}"),
        (("lll: {method", "lll: {together: true, earlier: memory, method"),
         "sequences.lll.earlier: memory, but with `together` no task is earlier"),
        (("lll: {method", "lll: {data: {sources: []}, method"),
         "sequences.lll.data.sources: is written for each run of a task; it comes from "
         "tasks.NAME.sources"),
        (("lll: {method", "lll: {out: x, method"),
         "sequences.lll.out: is written for each run of a task; it comes from base.out"),
        (("lll: {method", "lll: {later: {trai: {}}, method"),
         "sequences.lll.later.trai: no such setting; did you mean 'train'?"),
        (("  evaluation: {select: last}", "  evaluation: {sets: {}}"),
         "base.evaluation.sets: is written for each run of a task; it comes from tasks.NAME.test"),
        (("  evaluation: {select: last}", "  evaluation: 3"),
         "base.evaluation: expected settings (name: value)"),
        (("sequences:", "runs: {rev: {}}\nsequences:"),
         "sequences.lll: its run 'rev' has the name of another run"),
        (("sequences:", "runs: {x: {method: {a: run:previous}}}\nsequences:"),
         "runs.x.method.a: 'run:previous' is the run before in a sequence; here there is none"),
        (("sequences:", "teachers: {}\nsequences:"),
         "teachers: no sequence has `teacher: true` or `distilled: true`"),
        (("sequences:\n  lll: {method: {replay: {share: 0.2}}}\n", ""),
         "sequences: missing; ways to learn the tasks, by name"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_place(change, line):
    assert RECIPE.replace(*change) != RECIPE
    assert line in [found.removeprefix("a.yaml: ") for found in refused(RECIPE.replace(*change))]


@pytest.mark.parametrize(
    ("sequences", "line"),
    [
        (["a: {together: true, teacher: true}"],
         "sequences.a.teacher: with `together` there is one run, and a teacher knows one task"),
        (["a: {together: true, later: {seed: 2}}"],
         "sequences.a.later: with `together` there is one run, the first"),
        (["a: {together: true}"],
         "tasks.rev.validation: missing; sequences.a learns it with maj, which has one"),
        (["a: {together: true, method: {x: {y: run:previous}}}"],
         "sequences.a.method.x.y: 'run:previous' is the run before in a sequence; here there is "
         "none"),
        (["a: {teacher: true}", "maj:"], "sequences.maj: a task has this name, too"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_sequence_is_named(sequences, line):
    assert f"a.yaml: {line}" in refused(with_sequences(*sequences, teachers=True))


def test_names_of_runs_that_clash():
    text = with_sequences(
        "a:", "b: {teacher: true}", "rev-teacher: {together: true}", teachers=True
    )
    assert refused(text.replace(HELD_OUT, "")) == [
        "a.yaml: sequences.rev-teacher: its run 'rev-teacher' has the name of another run"
    ]


def test_mistakes_of_the_command_line():
    over = ["sequences.lll.earlir=real", "data.sources=[]", "tasks.rev.test=3"]
    assert refused(RECIPE, *over) == [
        "command line: data.sources: is written for each run of a task; it comes from "
        "tasks.NAME.sources",
        "command line: tasks.rev.test: expected settings (name: value), found 3",
        "command line: sequences.lll.earlir: no such setting; did you mean 'earlier'?",
    ]
