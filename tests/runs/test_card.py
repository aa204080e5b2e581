"""A model card says by which settings a model was made, and nothing about the machine."""

from pathlib import Path

import pytest

from dskd.runs.card import as_shared
from dskd.settings.run import Run

RUN = Run(out=Path("/home/me/runs/demo/student"))


@pytest.mark.parametrize(
    ("setting", "shared"),
    [
        ("/home/me/runs/demo/teacher/export", "teacher/export"),
        ("/home/me/runs/demo/student", "student"),
        ("/data/corpus.txt", "corpus.txt"),
        ("/data/corpus/", "corpus"),
        ("FacebookAI/roberta-base", "FacebookAI/roberta-base"),
        ("corpus/a.txt", "corpus/a.txt"),
        ("/", "/"),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_absolute_paths_are_not_told(setting, shared):
    assert as_shared(setting, RUN) == shared
    assert as_shared({"a": [{"b": setting}]}, RUN) == {"a": [{"b": shared}]}


def test_a_run_of_a_relative_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = f"{tmp_path}/demo/teacher"
    assert as_shared(path, Run(out=Path("demo/student"))) == "teacher"
