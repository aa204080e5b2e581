"""Settings of rows that other runs, or a run's own method, write."""

import os

from dskd.settings.folders import data_settings
from dskd.settings.recipe import read


def test_a_run_can_use_the_answers_of_another(tmp_path):
    path = tmp_path / "recipe.yaml"
    asked = "{kind: questions, path: 'run:a'}"
    path.write_text(
        "base: {out: o, model: {path: m}, method: {kind: lm}}\n"
        "runs:\n  a: {data: {sources: [{kind: questions, path: x}]}}\n"
        f"  b: {{data: {{sources: [{asked}], validation: [{asked}]}}}}\n"
    )
    data = read(path).runs["b"].data
    assert [s.path for s in (*data.sources, *data.validation)] == ["o/a/distilled.jsonl"] * 2


def test_what_a_method_writes_of_earlier_tasks_lies_in_the_runs_folder(tmp_path):
    path = tmp_path / "run.yaml"
    sources = "[{kind: questions, path: x}, {kind: replayed, domain: a}, {kind: replayed, "
    sources += "domain: b, path: ~/y}]"
    path.write_text(
        f"{{out: o, model: {{path: m}}, method: {{kind: lm}}, data: {{sources: {sources}}}}}"
    )
    run = read(path).runs["run"]
    found = [source.path for source in data_settings(run).sources]
    assert found == ["x", "o/replay/a.jsonl", os.path.expanduser("~/y")]
    assert run.data.replayed_domains == ["a", "b"] and run.data.sources[1].path is None
