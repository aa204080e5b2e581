"""Rows of questions: the original's layouts, what is cut, what a model wrote, and both readings."""

import numpy as np
import pytest

from dskd.batch import IGNORE
from dskd.data.layouts import QuestionLayout
from dskd.data.views import QuestionView
from dskd.errors import DataError
from tests.data.row_batches import row_batch
from tests.goldens import golden

CASES = golden("l2kd_tasks")["cases"]
ANS, END, PAD = 50257, 50256, 50258


def layout(block: int = 1024, room: int = 1) -> QuestionLayout:
    return QuestionLayout(ANS, END, block, room)


def shown(rows: list[list[int]], tasks_D: list[int], view: QuestionView | None = None):
    """What a view makes of rows, padded to the longest; each row is of the domain of its index."""
    lengths_B = np.array([len(row) for row in rows])
    tokens_BT = np.full((len(rows), lengths_B.max()), PAD)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row)] = row
    batch = row_batch(np.arange(len(rows)), 0, tokens_BT, lengths_B)
    batch = batch._replace(domains_B=np.arange(len(rows)))
    return (view or QuestionView(ANS, tasks_D))(batch), batch.repeated(2)


def check(row: list[int], task: int, expected: dict) -> None:
    """One row, read in both ways, against the original's arrays (-1: not learnt)."""
    (inputs_2T, labels_2T), _ = shown([row], [task])
    length = len(expected["cqa"])  # the original leaves the end token out of the inputs
    labels_2T = np.where(labels_2T == IGNORE, -1, labels_2T)
    assert row == expected["gen_Y"]
    assert inputs_2T[0, :length].tolist() == expected["cqa"]
    assert labels_2T[0].tolist() == expected["Y"] + [-1] * (len(row) - length)
    assert inputs_2T[1].tolist() == expected["gen_X"]
    assert labels_2T[1].tolist() == expected["gen_Y"]


LAYOUTS = [case for case in CASES if case["id"].startswith("layout_")]
BROKEN = "layout_tok_answer_cut_goes_negative"


@pytest.mark.parametrize(
    "case", [c for c in LAYOUTS if c["id"] != BROKEN], ids=lambda case: case["id"]
)
def test_rows_and_prompts_are_those_of_the_original(case):
    given = case["inputs"]
    parts = [given.get(f"{n}_ids") or given[n] for n in ("context", "question", "answer")]
    of = layout(given["max_len"])
    check(of.row(*parts), given.get("gen_token_id") or given["gen"], case["expected"])
    assert of.prompt(*parts[:2]) == case["expected"]["cq"]


def test_an_answer_is_cut_with_its_labels():
    """The original cut this answer to nothing in one reading and not at all in the other."""
    (case,) = (case for case in LAYOUTS if case["id"] == BROKEN)
    question, answer = case["inputs"]["question"], case["inputs"]["answer"]
    of = layout(case["inputs"]["max_len"], room=4)
    row = of.row(case["inputs"]["context"], question, answer)
    assert len(row) == 160 == len(question) + 1 + 9
    assert row == [*question, ANS, *answer[:8], END]
    (_, labels_2T), _ = shown([row], [9])
    assert labels_2T[0].tolist() == [IGNORE] * 150 + [*answer[:8], END, IGNORE]
    assert of.prompt(case["inputs"]["context"], question) == [1, 2, 3, 4, 5, *question, ANS]


def test_row_and_prompt_show_the_same_context_and_leave_room():
    context, question = list(range(40)), [100, 101]
    of = layout(24, room=6)
    for length in range(6):  # and the end token
        row = of.row(context, question, [200] * length)
        assert row[: row.index(ANS) + 1] == of.prompt(context, question)
        assert len(of.prompt(context, question)) + 6 == 24
    row = of.row(context, question, [200] * 9)  # an answer that is longer takes more of it
    assert row == [*range(24 - 2 - 1 - 10), *question, ANS, *[200] * 9, END]
    short = of.row(context[:3], question, [200])
    assert short == [0, 1, 2, 100, 101, ANS, 200, END]
    assert of.prompt(context[:3], question) == short[:6]


def test_a_question_that_leaves_no_room_is_refused():
    of = layout(24, room=6)
    assert len(of.row([], [1] * 17, [2] * 30)) == 24
    for make in (of.prompt, lambda *parts: of.row(*parts, [])):
        with pytest.raises(DataError, match=r"^its question of 18 tokens leaves no data\.quest"):
            make([1, 2], [1] * 18)


PSEUDO = [case for case in CASES if case["kind"] == "pseudo"]


@pytest.mark.parametrize("case", PSEUDO, ids=lambda case: case["id"])
def test_what_a_model_wrote_is_read_as_by_the_original(case):
    task, *written = case["inputs"]["tokens"]
    row = layout().parsed(written)
    if case["expected"].get("rejected"):
        assert row is None
    else:
        assert row is not None
        check(row, task, case["expected"])
        assert layout().parsed([*written, END]) == row


def test_only_what_stands_before_the_first_end_token_is_read():
    of = layout()
    assert of.parsed([1, ANS, 2, END, 3, ANS]) == [1, ANS, 2, END]
    assert of.parsed([1, END, ANS, 2]) is None
    assert of.parsed([1, ANS, ANS, 2, END]) is None
    assert of.parsed([ANS, 2]) == [ANS, 2, END]
    assert of.parsed([]) is None


def test_padded_rows_are_those_of_the_original():
    (case,) = (case for case in CASES if case["id"] == "collate_right_pad")
    rows = [row["gen_Y"] for row in case["inputs"]["rows"]]
    (inputs_BT, labels_BT), batch = shown(rows, [7, 7])
    labels_BT = np.where(labels_BT == IGNORE, -1, labels_BT)
    want = case["expected"]
    assert np.where(batch.real_BT, inputs_BT, PAD)[2:].tolist() == want["gen_X"]
    assert labels_BT[2:].tolist() == want["gen_Y"]
    assert labels_BT[:2, :-1].tolist() == want["Y"] and (labels_BT[:2, -1] == -1).all()
    within = np.arange(7) < batch.lengths_B[:2, None] - 1
    assert np.where(within, inputs_BT[:2, :-1], PAD).tolist() == want["cqa"]


def test_each_row_twice_behind_the_token_of_its_task():
    rows = [[1, 2, ANS, 3, END], [4, ANS, END]]
    (inputs_BT, labels_BT), batch = shown(rows, [70, 71])
    assert inputs_BT[2:, 0].tolist() == [70, 71]
    assert batch.ids_B.tolist() == [0, 1, 0, 1] and batch.lengths_B.tolist() == [5, 3, 5, 3]
    assert (labels_BT != IGNORE).sum(1).tolist() == [2, 1, 5, 3]
    assert labels_BT[labels_BT != IGNORE].tolist() == [3, END, END, 1, 2, ANS, 3, END, 4, ANS, END]


def test_as_questions_alone_rows_stay_as_they_are():
    rows = [[1, 2, ANS, 3, END], [4, ANS, END]]
    alone = QuestionView(ANS)
    (inputs_BT, labels_BT), batch = shown(rows, [], alone)
    assert inputs_BT.tolist() == batch.tokens_BT[:2].tolist()
    assert labels_BT[labels_BT != IGNORE].tolist() == [3, END, END]
    prints = {view.fingerprint for view in (alone, QuestionView(ANS, [70]), QuestionView(1))}
    assert len(prints) == 3
