"""Rows of earlier tasks that a model wrote, and what becomes of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from dskd.data.preparing import training_questions
from dskd.errors import DataError
from dskd.settings.data import Data, PretrainedTokenizer
from dskd.settings.examples import ReplayedSource
from tests.data.conftest import all_rows
from tests.data.test_questions import data_of, opened


def stored_tokenizer(folder: Path) -> PretrainedTokenizer:
    """The tokenizer of both tasks, in a folder."""
    place = opened(data_of(folder)).folder / "tokenizer"
    return PretrainedTokenizer(kind="pretrained", path=str(place))


def replaying(folder: Path, rows: list, **changes) -> Data:
    """``up`` is new, ``down`` is replayed by these lines of JSON."""
    path = folder / "written.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = data_of(folder, tokenizer=stored_tokenizer(folder), **changes)
    replayed = ReplayedSource(kind="replayed", path=str(path), domain="down")
    return new.model_copy(update={"sources": [new.sources[0], replayed]})


def of_down(data: Data) -> list[list[int]]:
    """The replayed rows of training; of validation there is none."""
    prepared = opened(data)
    splits = [prepared.train, prepared.validation]
    domains = [split.domains_B(np.arange(len(split))) for split in splits]
    assert (domains[1] == 0).all() and (domains[0] == 0).any()
    pairs = zip(all_rows(prepared.train), domains[0], strict=True)
    return [row for row, domain in pairs if domain == 1]


def test_written_rows_are_taken_as_they_are(tmp_path):
    tokenizer = opened(data_of(tmp_path)).tokenizer
    of = {text: tokenizer(text).input_ids[1:] for text in ("the cat", "sat ?", "the", "a __up__")}
    ans, end = 4, tokenizer.eos_token_id
    rows = [
        {"ids": [9, 8, ans, 7], "sample": 3},
        {"ids": [9, ans, end, 7, ans]},
        {"text": "the cat__ans__the", "task": "down"},
        {"text": "the cat__ans____ans__" + "</s>"},
        {"text": "a __up____ans__</s>the__ans__"},
        {"context": "the cat", "question": "sat ?", "answer": "the"},
        *({"ids": [n, ans, end]} for n in range(40, 60)),
    ]
    asked = rows.pop(3)
    want = [
        [9, 8, ans, 7, end],
        [9, ans, end],
        [*of["the cat"], ans, *of["the"], end],
        [*of["a __up__"], ans, end],
        [*of["the cat"], *of["sat ?"], ans, *of["the"], end],
        *([n, ans, end] for n in range(40, 60)),
    ]
    assert of_down(replaying(tmp_path, rows)) == want
    with pytest.raises(DataError, match=r"written\.jsonl:1: not exactly one __ans__, in all 2"):
        opened(replaying(tmp_path, [asked]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([4], "one of the keys 'ids', 'text' and 'question', not a list"),
        ({"answer": "a"}, "one of the keys 'ids', 'text' and 'question', not none of them"),
        ({"ids": [4], "text": "a"}, "'text' and 'question', not ['ids', 'text']"),
        ({"ids": "4"}, "no list of tokens under the key 'ids' but a value of type str"),
        ({"ids": [4, True]}, "'ids' holds a boolean, and no token"),
        ({"ids": [4, 1.0]}, "'ids' holds a number, and no token"),
        ({"ids": [4, 320]}, "the token 320 is none of data.tokenizer's 320"),
        ({"ids": [-1, 4]}, "the token -1 is none of data.tokenizer's 320"),
        ({"ids": [9, 8]}, "not exactly one __ans__, in all 0"),
        ({"ids": [4, 9, 4]}, "not exactly one __ans__, in all 2"),
        ({"ids": [9, 2, 4]}, "not exactly one __ans__ before its end token, in all 1"),
        ({"ids": [4, *[9] * 39]}, "a row of 41 tokens, more than data.block_size 40"),
        ({"text": None}, "no text under the key 'text' but null"),
        ({"text": "the cat"}, "not exactly one __ans__, in all 0"),
        ({"question": " ", "answer": "a"}, "an empty question"),
    ],
)  # fmt: skip
def test_lines_that_are_no_row_are_refused_by_file_and_line(tmp_path, row, message):
    data = replaying(tmp_path, [{"ids": [9, 4]}, row])
    with pytest.raises(DataError) as caught:
        opened(data)
    told = str(caught.value)
    assert told.startswith(f"{data.sources[1].path}:2: ") and message in told


def test_a_file_without_a_row_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^data\.sources: replayed: .*: no row in it"):
        opened(replaying(tmp_path, []))


def test_the_rows_name_the_folder_and_the_memory_does_not(tmp_path):
    data = replaying(tmp_path, [{"ids": [9, 4]}])
    first = opened(data)
    with_memory = data.model_copy(update={"memory": data.sources[:1]})
    assert opened(with_memory).folder == first.folder
    other = opened(replaying(tmp_path, [{"ids": [8, 4]}]))
    assert other.folder != first.folder
    assert other.train.fingerprint != first.train.fingerprint
    assert other.validation.fingerprint == first.validation.fingerprint


def test_training_questions_are_those_of_new_rows(tmp_path):
    data = replaying(tmp_path, [{"ids": [9, 4]}])
    prepared = opened(data)
    found = [question for _, question in training_questions(data)]
    assert len(found) == len(prepared.train) - 1 and 30 < len(found) < 55
    given = data.model_copy(update={"validation": data.sources[:1]})
    assert len(list(training_questions(given))) == 60
