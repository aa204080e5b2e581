"""Rows of further sources: those of a run's tokenizer, classes and domains, prepared beside its."""

import numpy as np
import pytest

from dskd.data import prepared
from dskd.data.layouts import QuestionEncoder
from dskd.data.prepared import open_further, open_prepared, prepare, prepare_further
from dskd.data.questions import questions
from dskd.data.views import view_for
from dskd.errors import DataError
from dskd.settings.data import JsonlSource, PretrainedTokenizer, TextSource
from dskd.settings.examples import Questions
from tests.data import test_labelled, test_questions
from tests.data.conftest import all_rows, make_corpus, settings
from tests.stores.caches import flip


def test_rows_of_text_are_those_that_the_run_would_have_made(corpus, tmp_path):
    """The same text as a run's own sources, none of it held out, is the run's rows of both splits
    in the order of the file, whatever the run's sources were."""
    data = settings(corpus, folder=tmp_path / "rows")
    beside = open_prepared(prepare(data))
    rows = open_further(prepare_further(data, data.sources, beside))
    whole = settings(corpus, folder=tmp_path / "rows", validation_fraction=1e-9)
    own = PretrainedTokenizer(kind="pretrained", path=str(beside.folder / "tokenizer"))
    whole = whole.model_copy(update={"validation": data.sources, "tokenizer": own})
    assert all_rows(rows) == all_rows(open_prepared(prepare(whole)).train)
    assert rows.domains_B(np.arange(len(rows))).max() == 0


def test_they_are_made_once_and_again_where_a_file_or_a_setting_changes(
    corpus, tmp_path, monkeypatch
):
    data = settings(corpus, folder=tmp_path / "rows")
    beside = open_prepared(prepare(data))
    make_corpus(tmp_path / "more.txt", 30)
    more = TextSource(kind="text", path=str(tmp_path / "more.txt"), domain="more")
    first = prepare_further(data, [more], beside)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "build_further", None)  # nothing is built again
        assert prepare_further(data, [more], beside) == first
    make_corpus(tmp_path / "more.txt", 31)
    changed = prepare_further(data, [more], beside)
    short = data.model_copy(update={"block_size": 16})
    folders = [first, changed, prepare_further(short, [more], beside)]
    assert len({open_further(folder).fingerprint for folder in folders}) == 3
    rows = open_further(first)
    assert set(rows.domains_B(np.arange(len(rows)))) == {1}  # behind the run's only one
    flip(first / "rows.ids", 0)
    with pytest.raises(DataError, match=r"rows\.ids: damaged, its checksum"):
        open_further(first)
    with pytest.raises(DataError, match="splits: rows, not train, validation"):
        open_prepared(changed)


def test_questions_of_other_tasks_have_the_runs_tokens(tmp_path):
    data = test_questions.data_of(tmp_path)
    up, down = data.sources
    own = data.model_copy(update={"sources": [up]})
    beside = open_prepared(prepare(own))
    rows = open_further(prepare_further(own, [down], beside))
    encode = QuestionEncoder(own, beside.tokenizer)
    assert all_rows(rows) == [row.tolist() for row in encode(list(questions(down)))]
    assert beside.domains == ["up", "down"]  # of all tasks that have tokens
    assert set(rows.domains_B(np.arange(len(rows)))) == {1} and rows.by_length


def test_a_domain_that_the_run_lacks_has_the_token_of_all_tasks(tmp_path):
    data = test_questions.data_of(tmp_path, questions=Questions(room=6, modelling=True))
    up, down = data.sources
    own = data.model_copy(update={"sources": [up]})
    beside = open_prepared(prepare(own))
    assert beside.domains == ["up"]
    rows = open_further(prepare_further(own, [up, down], beside))
    domains_B = rows.domains_B(np.arange(len(rows)))
    assert domains_B.tolist() == [0] * 60 + [1] * 60
    ids_B = np.array([0, 119])
    shown = view_for(own, beside.tokenizer, 0)(rows.rows(ids_B, ids_B * 0))
    token = beside.tokenizer.convert_tokens_to_ids("__gen__")
    assert shown.inputs_BT[2:, 0].tolist() == [token, token]


def test_labels_are_the_runs_classes_or_refused_by_name(tmp_path):
    lines = test_labelled.lines()
    data = test_labelled.data_of(tmp_path, lines, labels=["law", "sea", "Zoo"])
    beside = open_prepared(prepare(data))
    kept = [line for line in lines if line["label"] != "art"]
    path = test_labelled.write(tmp_path / "kept.jsonl", kept)
    source = JsonlSource(kind="jsonl", path=path, label="label")
    rows = open_further(prepare_further(data, [source], beside))
    assert beside.classes == ["Zoo", "law", "sea"]
    want = [beside.classes.index(line["label"]) for line in kept]
    assert test_labelled.labels_of(rows) == want and rows.labelled
    test_labelled.write(tmp_path / "kept.jsonl", [*kept, lines[2]])
    with pytest.raises(DataError) as caught:
        prepare_further(data, [source], beside)
    assert str(caught.value) == (
        f"{path}:46: the label 'art' is none of the run's classes; theirs are 'Zoo', 'law', 'sea'"
    )
