"""Named sets: further rows that a run's method is evaluated on, and what is refused by name."""

import json
from pathlib import Path

import pytest

from dskd.errors import ConfigError
from dskd.settings.compare import differences
from dskd.settings.recipe import read
from dskd.settings.run import Evaluation
from dskd.settings.yaml_tree import merge
from dskd.system.log import read_metrics
from tests.data.test_labelled import lines, write
from tests.launching import forked
from tests.runs.test_labelled_runs import labelled
from tests.runs.test_panel_runs import runs_of
from tests.runs.test_plan import BERT, checked, recipe_of
from tests.runs.test_question_runs import asked

HARD = {"kind": "hard_tokens", "metric": "quantile", "quantile": 0.3}


def twice(run: dict, sources: list) -> dict:
    """The run validated on these sources, and evaluated on them under another name."""
    sets = {"same": {"sources": sources, "rows": 8}, "less": {"sources": sources, "rows": 3}}
    more = {"data": {"validation": sources}, "evaluation": {"sets": sets, "every": 1}}
    return merge(run, merge(more, {"checkpoint": {"every": 1}}))


def results(line: dict, name: str) -> dict:
    return {k.removeprefix(f"{name}_"): v for k, v in line.items() if k.startswith(f"{name}_")}


def runs_of_all_kinds(folder: Path) -> dict:
    text = [{"kind": "builtin", "documents": 40, "domain": "more"}]
    bert = {"model": {"config": BERT}}
    questions = asked(folder, modelling=True)
    classes = labelled(folder)
    own = classes["data"]["sources"]
    held = [own[0] | {"path": write(folder / "held.jsonl", lines(30, seed=3)), "domain": "held"}]
    live = {"teacher": {"kind": "live", **bert}}
    return {
        "lm": twice(bert, text),
        "ki": twice(bert | live | {"method": {"kind": "ki", "steps": 2}}, text),
        "hard": twice(bert | {"data": {"masking": HARD}}, text),
        "evolve": twice(
            bert | {"data": {"masking": HARD}, "method": {"kind": "self_evolution"},
                    "teacher": {"kind": "self"}}, text),
        "classes": twice(classes | {"method": {"kind": "finetune"}}, held),
        "questions": twice(questions | {"method": {"kind": "l2kd"}}, questions["data"]["sources"]),
    }  # fmt: skip


def test_the_same_rows_under_another_name_have_the_same_results(tmp_path):
    """By every method, in training and of the export, at each evaluation, on 2 ranks."""
    runs = runs_of_all_kinds(tmp_path)
    forked(2, str(recipe_of(tmp_path, runs)), "train.micro_batch=2")
    for name in runs:
        folder = tmp_path / "runs" / name
        logged = [li for li in read_metrics(folder / "train" / "metrics.jsonl") if "loss" not in li]
        scores = json.loads((folder / "scores.json").read_text())
        assert [line["step"] for line in logged] == [1, 2]
        for line in (*logged, scores):
            own, same, less = (results(line, of) for of in ("eval", "same", "less"))
            assert own and own == same, name
            assert less.keys() == own.keys() and less != own
        assert logged[-1]["less_loss" if name == "classes" else "less_nll"] > 0
    confusion = json.loads((tmp_path / "runs" / "classes" / "confusion.json").read_text())
    assert sum(sum(row.values()) for row in confusion["rows"].values()) == 8  # of validation only


def a_set(**settings) -> dict:
    return {"evaluation": {"sets": {"up": {"sources": [{"kind": "builtin"}]} | settings}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"sets": {"a/b": {"sources": [{"kind": "builtin"}]}}}},
         "a/b: the name of a set is made of letters, digits, . _ and -, at most 100"),
        ({"evaluation": {"sets": {"eval": {"sources": [{"kind": "builtin"}]}}}},
         "eval: results of the validation rows are called eval_METRIC and eval.DOMAIN_METRIC; "
         "choose another"),
        ({"evaluation": {"sets": {"eval.x": {"sources": [{"kind": "builtin"}]}}}},
         "eval.x: results of the validation rows are called eval_METRIC and eval.DOMAIN_METRIC; "
         "choose another"),
        (a_set(metric="em"),
         "up.metric: em scores answers to questions, but the rows are none (data.questions)"),
        (a_set(longest=3),
         "up.longest: 3 tokens of an answer, but without evaluation.sets.up.metric none is "
         "written"),
        (a_set(sources=[{"kind": "squad", "path": "x"}]),
         "up.sources.0.kind: its questions need data.questions (`data.questions: {}`)"),
        (a_set(sources=[{"kind": "jsonl", "path": "x", "label": "y"}]),
         "up.sources.0.label: of data.objective classification, not masked"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_other_rows_is_refused_before_the_start(tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"only": merge({"model": {"config": BERT}}, changes)}))
    assert str(error.value) == f"runs.only.evaluation.sets.{message}"


SQUAD = [{"kind": "squad", "path": "x", "domain": "up"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "up.sources.0.kind: builtin has no questions; data.questions takes questions and "
             "squad"),
        ({"metric": "lfem", "sources": SQUAD},
         "up.metric: lfem is of queries of WikiSQL; name their file in `answers`"),
        ({"metric": "joint_goal_em", "sources": [*SQUAD, {**SQUAD[0], "answers": "y"}]},
         "up.metric: joint_goal_em is of turns of WOZ; name their file in `answers`"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_questions_is_refused_before_the_start(tmp_path, settings, message):
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"only": merge(asked(tmp_path), a_set(**settings))}))
    assert str(error.value) == f"runs.only.evaluation.sets.{message}"


def test_a_domain_without_a_token_is_refused(tmp_path):
    more = a_set(sources=[{**SQUAD[0], "domain": "upp"}])
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"only": merge(asked(tmp_path), more)}))
    told = "no token for the domain 'upp' of evaluation.sets.up.sources.0; did you mean 'up'?"
    assert str(error.value) == f"runs.only.data.questions.task_tokens: {told}"


def test_rows_without_any_label_are_refused(tmp_path):
    more = a_set(sources=[{"kind": "jsonl", "path": "x"}])
    run = merge(labelled(tmp_path) | {"method": {"kind": "finetune"}}, more)
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"only": run}))
    told = "missing; without label or target there is nothing to evaluate by"
    assert str(error.value) == f"runs.only.evaluation.sets.up.sources.0.label: {told}"


def test_paths_are_read_as_elsewhere_and_one_may_move(tmp_path):
    source = {"kind": "jsonl", "path": "~/x"}
    path = recipe_of(tmp_path, {"only": {"model": {"config": BERT}} | a_set(sources=[source])})
    found = read(path).runs["only"].evaluation.sets["up"].sources[0]
    assert found.path == str(Path.home() / "x")
    told = r"evaluation\.sets\.up\.sources\.0\.path: 'run:no' stands for nothing"
    with pytest.raises(ConfigError, match=told):
        source["path"] = "run:no"
        read(recipe_of(tmp_path, {"only": {"model": {"config": BERT}} | a_set(sources=[source])}))


def test_which_settings_may_change_between_two_calls(tmp_path):
    """Where files lie, and nothing that the results depend on."""

    def run(**settings):
        own = {"model": {"config": BERT}} | a_set(**{"sources": [source]} | settings)
        return read(recipe_of(tmp_path, {"only": own})).runs["only"]

    source = {"kind": "jsonl", "path": "x"}
    first, moved = run(), run(sources=[source | {"path": "y"}])
    assert differences(first, moved) == []
    assert differences(first, run(rows=3)) == ["evaluation.sets.up.rows: null, now 3"]
    named = run(sources=[source | {"domain": "a"}])
    told = "evaluation.sets.up.sources.0.domain: 'jsonl', now 'a'"
    assert differences(first, named) == [told]
    none = first.model_copy(update={"evaluation": Evaluation(every=2, rows=8)})
    assert [line.split(":")[0] for line in differences(none, first)] == ["evaluation.sets.up"]


def test_a_method_that_reads_stored_columns_is_refused(tmp_path):
    runs = runs_of(tmp_path)
    rows = {"evaluation": {"sets": {"more": {"sources": runs["one"]["data"]["sources"]}}}}
    checked(recipe_of(tmp_path, runs | {"one": merge(runs["one"], rows)}))
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, runs | {"fills": merge(runs["fills"], rows)}))
    assert str(error.value) == (
        "runs.fills.evaluation.sets.more: method muki is evaluated by what is stored of the "
        "validation rows, which other rows lack"
    )


def test_rows_that_are_missing_unlabelled_or_have_changed_are_named(tmp_path, capfd):
    path = write(tmp_path / "more.jsonl", [{"text": "a b", "label": None}])
    source = {"kind": "jsonl", "path": path, "label": "label", "unlabelled": True}
    run = merge(labelled(tmp_path) | {"method": {"kind": "finetune"}}, a_set(sources=[source]))
    words = (str(recipe_of(tmp_path, {"only": run})), "until=data")
    forked(1, *words, status=2)
    assert "error: evaluation.sets.up: none of its 1 rows has a label\n" in capfd.readouterr().err
    write(tmp_path / "more.jsonl", [{"text": "a b", "label": "art"}])
    forked(1, *words)
    write(tmp_path / "more.jsonl", [{"text": "a b", "label": "law"}])
    forked(1, *words, status=2)
    assert "evaluation.sets.up changed since the run was started" in capfd.readouterr().err
    Path(path).unlink()
    forked(1, *words, status=2)
    told = f"error: evaluation.sets.up: jsonl: {path}: no such file"
    assert told in capfd.readouterr().err
