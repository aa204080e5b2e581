"""Settings files: errors by name, recipes, overrides, round trips, what may change in a resume."""

import sys
from pathlib import Path

import pytest
from pydantic import Field, field_validator

from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.settings import yaml_tree
from dskd.settings.base import Section
from dskd.settings.compare import differences
from dskd.settings.data import HardTokens, Masking, PretrainedTokenizer
from dskd.settings.folders import cache_folder, questions_folder
from dskd.settings.parsing import parse
from dskd.settings.recipe import SINGLE, dump_run, read
from dskd.settings.run import Run, Train
from dskd.settings.teachers import CachedTeacher, LiveTeacher

RECIPE = """
base:
  out: runs/demo
  train: {steps: 30, lr: 1e-3}
  method: {kind: ki, schedule: constant, rate: 0.5}
  data: {masking: {draws: 2}}
runs:
  teacher:
    method: {kind: lm}
    teacher: null
  student:
    teacher: {kind: cached, k: 8, model: {path: "run:teacher"}}
    data: {tokenizer: {kind: pretrained, path: "run:teacher"}}
    train: {steps: 40}
  again:
    teacher: {kind: cached, path: "run:student"}
    model: {path: "run:student"}
  control:
"""


WHOLE = {
    "method": {"kind": "ki"},
    "model": {"path": "m"},
    "teacher": {"kind": "live", "model": {"path": "t"}},
    "data": {"sources": [{"kind": "builtin"}]},
}
"""What a settings file must name."""


def _write(tmp_path, text):
    """A file of these settings, and of what they lack of those that it must name."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    tree = yaml_tree.load(path)
    if isinstance(tree, dict):
        if not tree.keys() & {"base", "runs"}:
            path.write_text(yaml_tree.dump(yaml_tree.merge(WHOLE, tree)))
        elif isinstance(tree.get("base", {}), dict):
            tree["base"] = yaml_tree.merge(WHOLE, tree.get("base", {}))
            path.write_text(yaml_tree.dump(tree))
    return path


def _single(*overrides):
    return read(None, overrides).runs[SINGLE]


def _refused(tmp_path, text, *overrides):
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read(path, overrides)
    return [line.replace(f"{path}", "FILE") for line in str(caught.value).splitlines()]


# One run


def test_nothing_is_the_toy():
    recipe = read()
    assert recipe.runs == {SINGLE: Run()}
    assert recipe.out == Run().out
    assert Run().train.steps == 20


def test_file_then_command_line(tmp_path):
    path = _write(tmp_path, "out: x\ntrain: {steps: 7, lr: 1e-4, clip: 2, betas: [0, 0.95]}\n")
    run = read(path, ["train.steps=9", "train.eps=1e-9", "data.block_size=128"]).runs[SINGLE]
    assert run.out == Path("x")
    assert run.train == Train(steps=9, lr=1e-4, clip=2.0, betas=(0.0, 0.95), eps=1e-9)
    assert type(run.train.clip) is float
    assert run.data.block_size == 128


def test_a_section_without_kind_keeps_its_default_kind():
    run = _single("teacher.precision=bf16", "data.tokenizer.vocab_size=999", "method.rate=0.5")
    assert isinstance(run.teacher, LiveTeacher)
    assert run.teacher.precision == "bf16"
    assert run.data.tokenizer.vocab_size == 999
    assert run.method == {"kind": "ki", "schedule": "linear", "steps": 10, "rate": 0.5}


def test_an_override_of_a_mapping_that_the_file_leaves_out_changes_its_default(tmp_path):
    model = {"hidden_size": 32, "num_hidden_layers": 2}
    assert _single("model.config.hidden_size=32").model.config.items() >= model.items()
    assert _single("model.path=x").model.config == {}
    assert _single("method={kind: lm}").method == {"kind": "lm"}
    path = _write(tmp_path, "model: {path: x}\nmethod: {kind: ki}")
    run = read(path, ["model.config.dropout=0", "method.rate=0.5"]).runs[SINGLE]
    assert run.model.config == {"dropout": 0}
    assert run.method == {"kind": "ki", "rate": 0.5}


def test_a_section_of_another_kind_is_replaced(tmp_path):
    text = "teacher: {model: {path: m}}\nmodel: {config: {model_type: bert, a: 1}}"
    path = _write(tmp_path, text)
    overrides = ["teacher.path=c", "teacher.kind=cached", "model.config={model_type: gpt2, b: 2}"]
    run = read(path, overrides).runs[SINGLE]
    assert run.teacher == CachedTeacher(kind="cached", path=Path("c"))
    assert run.model.config == {"model_type": "gpt2", "b": 2}


def test_a_masking_without_kind_is_random(tmp_path):
    path = _write(tmp_path, "data: {masking: {probability: 0.3}}")
    assert read(path).runs[SINGLE].data.masking == Masking(probability=0.3)
    assert _single("data.masking.probability=0.3").data.masking == Masking(probability=0.3)
    over = ["data.masking.threshold=0.5", "data.masking.kind=hard_tokens"]
    hard = HardTokens(kind="hard_tokens", threshold=0.5)
    assert _single(*over).data.masking == hard
    assert read(path, over).runs[SINGLE].data.masking == hard  # another kind: replaced
    path = _write(tmp_path, "data: {masking: {kind: hard_tokens, probability: 0.3}}")
    masking = read(path, ["data.masking.threshold=0.5"]).runs[SINGLE].data.masking
    assert masking == hard.model_copy(update={"probability": 0.3})


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("train: {steps: 3}", ["method", "model", "data.sources"]),
        ("method: {kind: lm}\ndata: {objective: causal}", ["model", "data.sources"]),
        ("method: {kind: ki}\nteacher: {precision: fp32}\nmodel: {path: m}\n"
         "data: {sources: [{kind: builtin}]}", ["teacher.model"]),
        ("method: {kind: ki}\nteacher: {kind: routed, domains: {x: {kind: live}}}\n"
         "model: {path: m}\ndata: {sources: [{kind: builtin}]}", ["teacher.domains.x.model"]),
    ],
)  # fmt: skip
def test_nothing_of_the_toy_is_laid_under_a_file(tmp_path, text, missing):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    found = [line.removeprefix(f"{path}: ").split(":")[0] for line in f"{caught.value}".split("\n")]
    assert found == missing


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("out=a[1]", "out: 'a[1]': DeepSpeed reads checkpoints by patterns"),
        ("out=a*/b", "out: 'a*/b': DeepSpeed reads checkpoints by patterns"),
        (f"out={'x' * 256}", "has a name of 256 bytes; file systems take 255"),
        (
            "data.folder=a/" + "\u00e9" * 128 + "/b",
            "has a name of 256 bytes; file systems take 255",
        ),
        (f"model.path={'x/' * 2100}", "has 4200 bytes; file systems take 4095"),
    ],
    ids=lambda value: value[:16],
)
def test_a_path_that_cannot_be_used_is_refused(override, problem):
    with pytest.raises(ConfigError) as caught:
        _single(override)
    assert problem in str(caught.value) and len(str(caught.value)) < 300


def test_a_folder_of_a_run_is_that_of_its_config(tmp_path):
    path = _write(tmp_path, "out: null")
    assert read(path).runs[SINGLE].out == read(path).out == tmp_path
    path.write_text(dump_run(_single("out=far/away"), here=True))
    assert read(path).runs[SINGLE] == _single(f"out={tmp_path}")
    with pytest.raises(ConfigError, match="out: expected"):
        _single("out=null")


def test_a_file_without_a_teacher_has_none(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml_tree.dump({name: WHOLE[name] for name in ("method", "model", "data")}))
    assert read(path).runs[SINGLE].teacher is None
    assert read(path, ["teacher.model.path=x"]).runs[SINGLE].teacher.model.path == "x"


STORED = ("model.path=./bert", "data.tokenizer.kind=pretrained", "data.tokenizer.path=./bert")


def test_a_stored_model_without_a_file_takes_the_toys_teacher_away():
    """Which does not speak its vocabulary; its data stay, its method unless another is named."""
    run = _single(*STORED, "method.kind=lm")
    assert (run.teacher, run.model.path, run.model.config) == (None, "./bert", {})
    assert run.data.sources == Run().data.sources and run.data.block_size == Run().data.block_size
    assert _single("model.path=runs/toy/export").teacher == Run().teacher  # of its own vocabulary
    other = _single(*STORED, "teacher.model.path=./bert")
    assert (other.teacher.model.path, other.method) == ("./bert", Run().method)
    assert (
        _single(*STORED, "teacher.kind=self", "method.kind=self_evolution").teacher.kind == "self"
    )


@pytest.mark.parametrize(
    "more", [(), ("method.kind=ki",), ("teacher.precision=bf16", "method.kind=lm")]
)
def test_the_toys_teacher_is_none_for_a_stored_model(more):
    with pytest.raises(ConfigError) as caught:
        _single(*STORED, *more)
    assert str(caught.value).removeprefix("command line: ") == (
        "teacher: the toy's has another vocabulary than model.path './bert'; name one that has it "
        "(teacher.model.path), or a method without: lm"
    )


def test_an_entry_of_a_list_can_be_overridden(tmp_path):
    path = _write(tmp_path, "data: {sources: [{kind: builtin}, {kind: text, path: x}]}")
    sources = read(path, ["data.sources.1.path=y"]).runs[SINGLE].data.sources
    assert [source.kind for source in sources] == ["builtin", "text"]
    assert sources[1].path == "y"


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    run = _single("out=~/runs", "data.folder=~/data", "model.path=~/m", "deepspeed=~/d.json")
    source = _single("data.sources=[{kind: text, path: ~/t}]").data.sources[0]
    assert source.path == "/home/u/t"
    assert (run.out, run.data.folder) == (Path("/home/u/runs"), Path("/home/u/data"))
    assert (run.model.path, run.deepspeed) == ("/home/u/m", "/home/u/d.json")
    teacher = _single("teacher.deepspeed=~/t.json", "teacher.model.path=~/m").teacher
    assert (teacher.deepspeed, teacher.model.path) == ("/home/u/t.json", "/home/u/m")


# Mistakes


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {step: 5}", "train.step: no such setting; did you mean 'steps'?"),
        ("tran: {}", "tran: no such setting; did you mean 'train'?"),
        ("lr: 1", "lr: no such setting; did you mean 'train.lr'?"),
        ("whole_word: true",
         "whole_word: no such setting; did you mean 'data.masking.whole_word'?"),
        ("checkpoint: {xyz: 1}", "checkpoint.xyz: no such setting; there are every, keep, export"),
        ("teacher: {kind: liv}",
         "teacher.kind: 'liv' is not one of live, cached, routed, self, panel"),
        ("teacher: {kind: panel, teachers: {x: {}}}", "teacher.teachers.x.model: missing"),
        ("teacher: {kind: panel, teachers: {a/b: {model: {path: x}}}}",
         "teacher.teachers: 'a/b': a name is made of letters, digits, _ and -"),
        ("teacher: {kind: panel, teachers: {x: {model: {path: x}}}, confidence: pases}",
         "teacher.confidence: 'pases' is not one of passes, logits, or the path of a .npy"),
        ("teacher: {kind: panel, scores: live, confidence: logits, passes: 4,"
         " teachers: {x: {model: {path: x}}}}",
         "teacher.passes: 4, but live teachers make one pass for confidence logits"),
        ("teacher: {kind: panel, passes: 1, dropout: 0.2, teachers: {x: {model: {path: x}}}}",
         "teacher.dropout: 0.2, but a single pass has no dropout"),
        ("teacher: {kind: routed, domains: {x: {model: {}}}}",
         "teacher.domains.x.kind: missing; one of live, cached"),
        ("teacher: {kind: routed, domains: {x: {kind: live, model: {}, modle: {}}}}",
         "teacher.domains.x.modle: no such setting; did you mean 'model'?"),
        ("data: {sources: [{path: x}]}",
         "data.sources.0.kind: missing; one of builtin, text, jsonl, datasets, fairseq, csv, "
         "tsv, glue, questions, squad, replayed"),
        ("data: {sources: [{kind: text}]}", "data.sources.0.path: missing"),
        ("data: {masking: {kind: hard}}",
         "data.masking.kind: 'hard' is not one of random, hard_tokens"),
        ("data: {masking: {probabilty: 0.2}}",
         "data.masking.probabilty: no such setting; did you mean 'probability'?"),
        ("data: {masking: {kind: hard_tokens, treshold: 0.2}}",
         "data.masking.treshold: no such setting; did you mean 'threshold'?"),
        ("data: {masking: {kind: hard_tokens, most: 0}}",
         "data.masking.most: 0 should be greater than 0"),
        ("data: {masking: {threshold: 0.2}}",
         "data.masking.threshold: no such setting; there are probability, keep, random, draws,"
         " kind, whole_word, sampler"),
        ("data: {masking: {kind: hard_tokens, model: {pth: x}}}",
         "data.masking.model.pth: no such setting; did you mean 'path'?"),
        ("data: {sources: []}",
         "data.sources: List should have at least 1 item after validation, not 0"),
        ("data: {sources: text}", "data.sources: expected a list, found 'text'"),
        ("data: {packing: whole}",
         "data.packing: 'whole' is not one of complete, complete_doc, contiguous"),
        ("train: {steps: abc}", "train.steps: expected a whole number, found 'abc'"),
        ("train: {steps: 1.5}", "train.steps: expected a whole number, found 1.5"),
        ("train: {steps: 1e3}", "train.steps: expected a whole number, found 1000.0"),
        ("train: {steps: true}", "train.steps: expected a whole number, found true"),
        ("train: {steps: '5'}", "train.steps: expected a whole number, found '5'"),
        ("train: {steps: 0}", "train.steps: 0 should be greater than or equal to 1"),
        ("train: {batch: }", "train.batch: expected a whole number, found null"),
        ("train: {lr: true}", "train.lr: expected a number, found true"),
        ("train: {lr: fast}", "train.lr: expected a number, found 'fast'"),
        ("train: {lr: .inf}", "train.lr: expected a finite number, found inf"),
        ("train: {compile: yes}", "train.compile: expected true or false, found 'yes'"),
        ("train: {compile: 1}", "train.compile: expected true or false, found 1"),
        ("train: {betas: [0.9]}", "train.betas.1: missing"),
        ("train: {betas: [0.9, 1]}", "train.betas.1: 1 should be less than 1"),
        ("train: {betas: 0.9}", "train.betas: expected a list, found 0.9"),
        ("train: 3", "train: expected settings (name: value), found 3"),
        ("train:", "train: expected settings (name: value), found null"),
        ("out: 3", "out: expected text, found 3"),
        ("model: {revision: 12e4}", "model.revision: expected text, found 120000.0"),
        ("model: {path: 'run:x'}", "model.path: 'run:x' names no earlier run; earlier ones: none"),
        ("method: ki", "method: expected settings (name: value), found 'ki'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_file(tmp_path, text, line):
    assert _refused(tmp_path, text) == [f"FILE: {line}"]


def test_all_mistakes_at_once_and_whose_they_are(tmp_path):
    text = "train: {step: 5, lr: x}\nseed: -1\n"
    lines = _refused(tmp_path, text, "train.clip=-1", "model.pth=x")
    assert sorted(lines) == [
        "FILE: seed: -1 should be greater than or equal to 0",
        "FILE: train.lr: expected a number, found 'x'",
        "FILE: train.step: no such setting; did you mean 'steps'?",
        "command line: model.pth: no such setting; did you mean 'path'?",
        "command line: train.clip: -1 should be greater than or equal to 0",
    ]


def test_without_a_file_no_file_is_named():
    with pytest.raises(ConfigError, match=r"^command line: train\.stps: no such setting"):
        _single("train.stps=3")
    with pytest.raises(ConfigError, match=r"runs: the toy run is a single run, not a recipe"):
        _single("runs.a.train.steps=3")


def test_a_file_that_is_no_mapping(tmp_path):
    assert _refused(tmp_path, "[1]") == ["FILE: expected settings (name: value), found [1]"]


class _Method(Section):
    kind: str = "m"
    temperature: float = Field(1.0, gt=0)
    steps: int = 0

    @field_validator("steps")
    @classmethod
    def _some(cls, steps):
        if steps < 1:
            raise ValueError("a linear schedule needs steps")
        return steps


def test_parse_names_the_section():
    assert parse(_Method, {"temperature": 2, "steps": 1}, "method").temperature == 2.0
    with pytest.raises(ConfigError) as caught:
        parse(_Method, {"temprature": 1, "temperature": 0, "steps": 0}, "method", where="a.yaml")
    assert str(caught.value).splitlines() == [
        "a.yaml: method.temperature: 0 should be greater than 0",
        "a.yaml: method.steps: a linear schedule needs steps",
        "a.yaml: method.temprature: no such setting; did you mean 'temperature'?",
    ]
    with pytest.raises(ConfigError, match=r"^method: expected settings \(name: value\), found 3$"):
        parse(_Method, 3, "method")


@pytest.mark.parametrize("name", ["lr=[1e-3]", "a*", "b?"])
def test_a_folder_that_is_a_pattern(tmp_path, name):
    """DeepSpeed takes the path of its checkpoints for one; nothing else is read by patterns."""
    line = f"out: 'runs/{name}': DeepSpeed reads checkpoints by patterns; without * ? and [, please"
    assert _refused(tmp_path, f"out: 'runs/{name}'") == [f"FILE: {line}"]
    assert _refused(tmp_path, "{}", f"out=runs/{name}") == [f"command line: {line}"]
    recipe = f"base: {{out: 'runs/{name}'}}\nruns: {{a: {{}}, b: {{model: {{path: 'run:a'}}}}}}\n"
    assert _refused(tmp_path, recipe) == [f"FILE: {line}"]
    assert _refused(tmp_path, "base: {}\nruns: {a: {}, b: {}}", f"out=runs/{name}") == [
        f"command line: {line}"
    ]
    folder = tmp_path / name
    folder.mkdir()
    lines = _refused(folder, "out: null")
    assert lines == [f"FILE: {line.replace('runs/' + name, str(folder))}"]
    _single(f"data.folder=data/{name}", f"model.path=m/{name}", f"teacher.model.path=t/{name}")


# Recipes


def test_a_recipe(tmp_path):
    recipe = read(_write(tmp_path, RECIPE))
    assert recipe.out == Path("runs/demo")
    assert list(recipe.runs) == ["teacher", "student", "again", "control"]
    teacher, student, again, control = recipe.runs.values()
    assert [run.out.name for run in recipe.runs.values()] == list(recipe.runs)
    assert student.out == Path("runs/demo/student")
    assert teacher.method == {"kind": "lm"}
    assert teacher.teacher is None
    assert student.method == {"kind": "ki", "schedule": "constant", "rate": 0.5}
    export = "runs/demo/teacher/export"
    assert (student.teacher.model.path, student.teacher.k) == (export, 8)
    assert student.data.tokenizer == PretrainedTokenizer(kind="pretrained", path=export)
    assert student.data.masking.draws == 2
    assert (student.train.steps, control.train.steps) == (40, 30)
    assert again.teacher.path == Path("runs/demo/student/cache")
    assert again.model.path == "runs/demo/student/export"
    assert isinstance(control.teacher, LiveTeacher)


def test_a_run_can_use_the_caches_of_a_routed_one(tmp_path):
    routed = "teacher: {kind: routed, domains: {x: {kind: cached, %s}, y: {kind: cached, %s}}}"
    first, second = routed % ("k: 4", "path: p"), routed % (("path: 'run:a'",) * 2)
    recipe = f"base: {{out: o}}\nruns:\n  a: {{{first}}}\n  b: {{{second}}}\n"
    domains = read(_write(tmp_path, recipe)).runs["b"].teacher.domains
    assert [domains[name].path for name in "xy"] == [Path("o/a/cache/x"), Path("p")]


def test_a_run_can_use_the_scores_of_anothers_panel(tmp_path):
    panel = "teacher: {kind: panel, path: %s, teachers: {x: {model: {path: 'run:t'}}}}"
    recipe = f"base: {{out: o}}\nruns:\n  t: {{}}\n  a: {{{panel % 'null'}}}\n"
    recipe += f"  b: {{{panel % 'run:a'}}}\n  c: {{{panel % 'run:b'}}}\n"
    runs = read(_write(tmp_path, recipe)).runs
    assert [cache_folder(runs[name], "x") for name in "abc"] == [Path("o/a/cache/x")] * 3
    assert runs["c"].teacher.teachers["x"].model.path == "o/t/export"


def test_a_run_can_use_the_hard_tokens_of_another(tmp_path):
    hard = "data: {masking: {kind: hard_tokens, store: %s, model: {path: 'run:base'}}}"
    recipe = "base: {out: o}\nruns:\n  base: {}\n"
    recipe += f"  a: {{{hard % 'null'}}}\n  b: {{{hard % 'run:a'}}}\n  c: {{{hard % 'run:b'}}}\n"
    runs = read(_write(tmp_path, recipe)).runs
    assert [questions_folder(runs[name]) for name in "abc"] == [Path("o/a/questions")] * 3
    assert runs["b"].data.masking.model.path == "o/base/export"
    assert _refused(tmp_path, recipe.replace("run:a", "run:base")) == [
        "FILE: runs.b.data.masking.store: 'run:base' has no store, its masking is not of hard"
        " tokens"
    ]


@pytest.mark.parametrize("field", ["sources", "validation"])
def test_a_run_leaves_no_text(tmp_path, field):
    recipe = f"base: {{}}\nruns:\n  a:\n  b: {{data: {{{field}: [{{kind: text, path: 'run:a'}}]}}}}"
    assert _refused(tmp_path, recipe) == [
        f"FILE: runs.b.data.{field}.0.path: 'run:a' stands for nothing that a run leaves; give a"
        " path"
    ]


def test_overrides_of_all_runs_and_of_one(tmp_path):
    overrides = ["out=/o", "train.steps=5", "runs.student.train.steps=6", "runs.teacher.seed=9"]
    runs = read(_write(tmp_path, RECIPE), overrides).runs
    assert [run.train.steps for run in runs.values()] == [5, 6, 5, 5]
    assert [run.seed for run in runs.values()] == [9, 1, 1, 1]
    assert [str(run.out) for run in runs.values()][:2] == ["/o/teacher", "/o/student"]
    assert runs["student"].teacher.model.path == "/o/teacher/export"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("steps: 40", "stps: 40"),
         "runs.student.train.stps: no such setting; did you mean 'steps'?"),
        (("steps: 30", "stps: 30"), "train.stps: no such setting; did you mean 'steps'?"),
        (('"run:teacher"}}\n    data', '"run:techer"}}\n    data'),
         "runs.student.teacher.model.path: 'run:techer' names no earlier run; did you mean"
         " 'teacher'?; earlier ones: teacher"),
        (("  teacher:\n", "  teacher:\n    model: {path: 'run:student'}\n"),
         "runs.teacher.model.path: 'run:student' names no earlier run; earlier ones: none"),
        (('path: "run:student"}\n    model', 'path: "run:teacher"}\n    model'),
         "runs.again.teacher.path: 'run:teacher' has no cache, its teacher is not a cached one"),
        (("train: {steps: 40}", "out: x"),
         "runs.student.out: a run of a recipe writes to <out>/<name>; set base.out"),
        (("  control:", "  con.trol:"),
         "runs.con.trol: the name of a run is made of letters, digits, _ and -"),
        (("  control:", "  control: 3"), "runs.control: expected settings (name: value)"),
        (("base:", "train: {}\nbase:"),
         "train: a recipe has only base and runs at its top; does it belong into base?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_is_named(tmp_path, change, line):
    assert RECIPE.replace(*change) != RECIPE
    assert _refused(tmp_path, RECIPE.replace(*change)) == [f"FILE: {line}"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("runs.student=0", "runs.student: expected settings (name: value)"),
        ("runs.student=null", "runs.student: expected settings (name: value)"),
        ("runs=0", "command line: runs: write runs.NAME.a.b=value"),
    ],
)
def test_an_override_that_is_nothing_is_not_passed_over(tmp_path, change, problem):
    assert any(problem in line for line in _refused(tmp_path, RECIPE, change))


def test_mistakes_in_overrides_of_a_recipe(tmp_path):
    assert _refused(tmp_path, RECIPE, "runs.studnt.train.steps=3", "train.stps=4") == [
        "command line: runs.studnt: no such run; did you mean 'student'?",
        "command line: train.stps: no such setting; did you mean 'steps'?",
    ]
    assert _refused(tmp_path, RECIPE, "runs.student.train.stps=3") == [
        "command line: runs.student.train.stps: no such setting; did you mean 'steps'?"
    ]
    assert _refused(tmp_path, "base: {}") == [
        "FILE: a recipe needs base: {...} and runs: {name: {...}}"
    ]


# Writing and comparing


def test_dump_round_trips(tmp_path):
    for name, run in read(_write(tmp_path, RECIPE)).runs.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_run(run))
        assert read(path).runs == {SINGLE: run}
    own = ["data.masking={kind: hard_tokens, store: s, most: 0.3}", "teacher={kind: self}"]
    path.write_text(dump_run(_single(*own)))
    assert read(path).runs == {SINGLE: _single(*own)}


FREE = ["out=elsewhere", "until=data", "deepspeed=zero3", "teacher.deepspeed=zero3", "log_every=3"]
FREE += ["train.micro_batch=2", "train.compile=true", "train.activation_checkpointing=true"]
FREE += ["checkpoint.every=3", "checkpoint.keep=9", "evaluation.every=3", "data.folder=x"]
FREE += ["evaluation.micro_batch=3", "ranks_timeout=0.5", "evaluation.every=epoch"]
FREE += ["train.lr=2e-3", "train.epochs=2", "train.steps=40", "train.warmup=0.1"]
FREE += ["train.schedule=constant", "train.end_lr=1e-5", "train.power=2"]


@pytest.mark.parametrize(
    ("override", "lines"),
    [
        ("train.batch=32", ["train.batch: 16, now 32"]),
        ("train.weight_decay=0.1", ["train.weight_decay: 0.01, now 0.1"]),
        ("seed=2", ["seed: 1, now 2"]),
        ("teacher=null", ["teacher: 'live', now null"]),
        ("teacher.kind=cached", ["teacher: 'live', now 'cached'"]),
        ("teacher.precision=bf16", ["teacher.precision: 'auto', now 'bf16'"]),
        ("method.temperature=3", ["method.temperature: null, now 3"]),
        ("model.config.hidden_size=32", ["model.config.hidden_size: 64, now 32"]),
        ("evaluation.rows=5", ["evaluation.rows: null, now 5"]),
        ("data.masking.draws=2", ["data.masking.draws: null, now 2"]),
        ("data.masking.kind=hard_tokens", ["data.masking: 'random', now 'hard_tokens'"]),
        ("teacher.kind=self", ["teacher: 'live', now 'self'"]),
        *((free, []) for free in FREE),
    ],
)
def test_what_may_change_in_a_resume(override, lines):
    assert differences(Run(), _single(override)) == lines
    assert differences(Run(), Run()) == []


def test_random_masks_are_not_chosen_later():
    changed = _single("data.masking.probability=0.3")
    line = "data.masking.probability: 0.15, now 0.3"
    assert differences(Run(), changed, chosen=False) == [line]


def test_geometry_of_cached_teachers_is_free():
    cached = "teacher={kind: routed, domains: {builtin: {kind: cached}}}"
    one = "teacher.domains.builtin"
    free = [f"{one}.micro_batch=3", f"{one}.rows_per_shard=5", f"{one}.deepspeed=zero3"]
    assert differences(_single(cached), _single(cached, *free)) == []
    assert differences(_single(cached), _single(cached, f"{one}.k=3")) == [f"{one}.k: 32, now 3"]


def test_where_hard_tokens_are_stored_is_free():
    hard = "data.masking={kind: hard_tokens}"
    place = "data.masking"
    free = [f"{place}.store=s", f"{place}.micro_batch=3", f"{place}.rows_per_shard=5"]
    assert differences(_single(hard), _single(hard, *free)) == []
    changed = _single(hard, f"{place}.threshold=0.5", f"{place}.shown=mask")
    assert differences(_single(hard), changed) == [
        "data.masking.shown: 'token', now 'mask'",
        "data.masking.threshold: 0.1, now 0.5",
    ]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def (", "importing 'broken' fails: SyntaxError: "),
        ("import nowhere_at_all", "importing 'broken' fails: ModuleNotFoundError: No module named"),
        ("raise RuntimeError('at once')", "importing 'broken' fails: RuntimeError: at once"),
        ("Name = 3", "Name is no method"),
        ("", "'broken' has no 'Name'"),
    ],
)
def test_a_broken_module_of_a_method_is_named(tmp_path, monkeypatch, source, problem):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ConfigError, match=f"^method.kind: .*{problem}"):
        build_method({"kind": "broken:Name"})


def test_the_base_of_all_methods_is_none():
    with pytest.raises(ConfigError, match=r"^method\.kind: dskd\.methods\.base:Method has no loss"):
        build_method({"kind": "dskd.methods.base:Method"})
    with pytest.raises(ConfigError, match=r"^method\.kind: no module 'dskd\.method' on the path"):
        build_method({"kind": "dskd.method:Method"})
