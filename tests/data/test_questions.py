"""Questions from JSON lines and files in the layout of SQuAD, and the rows that they become."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dskd.batch import IGNORE
from dskd.data.layouts import QuestionEncoder
from dskd.data.loader import Loader, make_batch
from dskd.data.prepared import open_prepared, prepare
from dskd.data.questions import questions
from dskd.data.tokenizers import load_tokenizer
from dskd.data.views import view_for
from dskd.errors import ConfigError, DataError
from dskd.settings.data import Data, PretrainedTokenizer, TextSource, TrainedTokenizer
from dskd.settings.examples import Questions, QuestionSource, SquadSource
from tests.data.conftest import WORDS, all_rows

TASKS = {"up": "__up__", "down": "__down__"}


def write_lines(path: Path, rows: list) -> QuestionSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return QuestionSource(kind="questions", path=str(path))


def found(source) -> list[tuple]:
    return [question[:-1] for question in questions(source)]


def test_questions_of_json_lines(tmp_path):
    rows = [
        {"context": "a b", "question": "what ?", "answer": "c", "id": 7},
        {"question": "which ?", "answers": ["d", "e f"]},
        {"context": "", "question": "who ?", "answer": ""},
    ]
    want = [
        ("a b", "what ?", ("c",), None), ("", "which ?", ("d", "e f"), None),
        ("", "who ?", ("",), None),
    ]  # fmt: skip
    source = write_lines(tmp_path / "a.jsonl", rows)
    assert found(source) == want
    assert [q.place for q in questions(source)][-1] == f"{source.path}:3"
    assert found(source.model_copy(update={"documents": 2})) == want[:2]
    packed = tmp_path / ".packed" / "a.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(Path(source.path).read_bytes()))
    assert found(source.model_copy(update={"path": str(packed)})) == want
    assert found(source.model_copy(update={"path": str(tmp_path)})) == want  # as a folder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "a", "answer": "b"}, "no text under the key 'question'; its keys are ['an"),
        ({"question": " ", "answer": "b"}, "an empty question"),
        ({"question": 7, "answer": "b"}, "no text under the key 'question' but a number"),
        ({"question": "a"}, "no text under the key 'answer'; its keys are ['question']"),
        ({"question": "a", "answer": None}, "no text under the key 'answer' but null"),
        ({"question": "a", "answer": "b", "answers": ["b"]}, "both 'answer' and 'answers'; one of"),
        ({"question": "a", "answers": []}, "no list of texts under the key 'answers' but an empty"),
        ({"question": "a", "answers": "b"}, "no list of texts under the key 'answers' but a value"),
        ({"question": "a", "answers": ["b", 1]}, "no text in 'answers' but a number"),
        ({"question": "a", "answer": "b", "context": []}, "no text under the key 'context' but a "),
        ([1], "no text under the key 'question'; it is no object but a list"),
    ],
)  # fmt: skip
def test_lines_that_are_no_question_are_refused_by_file_and_line(tmp_path, row, message):
    source = write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}, row])
    with pytest.raises(DataError) as caught:
        found(source)
    assert str(caught.value).startswith(f"{source.path}:2: {message}")


def test_a_file_without_a_question_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^data\.sources: questions: .*: no question in it"):
        found(write_lines(tmp_path / "a.jsonl", []))


def squad(path: Path, *groups: tuple[str, list[dict]], **more) -> SquadSource:
    """A file of paragraphs, each a context and its entries."""
    paragraphs = [{"context": context, "qas": entries} for context, entries in groups]
    path.write_text(json.dumps({"data": [{"title": "dummy", "paragraphs": paragraphs}]}))
    return SquadSource(kind="squad", path=str(path), **more)


def entry(key: str | int, question: str, *answers: str, **more) -> dict:
    texts = [{"answer_start": None, "text": text} for text in answers]
    return {"id": key, "question": question, "is_impossible": False, "answers": texts, **more}


def test_questions_of_the_originals_files(tmp_path):
    source = squad(
        tmp_path / "rest_to_squad-test-v2.0.json",
        ("inform(food=thai)", [entry("x", "what ?", "thai food", "it is thai")]),
        ("a b", [entry("x", "who ?", "b"), entry("y", "when ?", is_impossible=True)]),
    )
    assert found(source) == [
        ("inform(food=thai)", "what ?", ("thai food", "it is thai"), None),
        ("a b", "who ?", ("b",), None), ("a b", "when ?", ("",), None),
    ]  # fmt: skip
    place = [q.place for q in questions(source)][-1]
    assert place == f"{source.path}: data 0, paragraph 1, question 1"
    assert found(source.model_copy(update={"path": str(tmp_path)})) == found(source)
    want, path = found(source), Path(source.path)
    path.with_name("b.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert found(source.model_copy(update={"path": str(tmp_path)})) == want


@pytest.mark.parametrize(("keys", "order"), [(["b", "c", "a"], [1, 2, 0]), ([2, 10, 1], [1, 2, 0])])
def test_an_answer_file_is_in_the_order_of_the_ids(tmp_path, keys, order):
    answers = tmp_path / "woz.en_answers.json"
    entries = [["en_0_0", "none"], ["en_0_1", "food: thai;"], ["en_0_2", "; phone"]]
    answers.write_text(json.dumps(entries))
    groups = [("a", [entry(key, "q ?", "b")]) for key in keys]
    source = squad(tmp_path / "woz.json", *groups, answers=str(answers))
    assert [q.detail for q in questions(source)] == [entries[n] for n in order]
    assert [q.detail for q in questions(source.model_copy(update={"documents": 1}))] == [entries[1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("data"), ": no value under the key 'data'; its keys are []"),
        (lambda d: d.update(data={}), ": no list under the key 'data' but an object"),
        (lambda d: d["data"][0].update(paragraphs=[[]]),
         ": data 0, paragraph 0: no value under the key 'context'; it is no object but a list"),
        (lambda d: d["data"][0]["paragraphs"][0].update(context=1),
         ": data 0, paragraph 0: no text under the key 'context' but a number"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(question=""),
         ": data 0, paragraph 0, question 0: an empty question"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=[]),
         ": data 0, paragraph 0, question 0: no answer, but it is not said to be impossible"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=[{}]),
         ": data 0, paragraph 0, question 0: no value under the key 'text'; its keys are []"),
    ],
)  # fmt: skip
def test_files_of_another_layout_are_refused_by_place(
    tmp_path, change: Callable[[dict], object], message
):
    source = squad(tmp_path / "a.json", ("a", [entry("x", "what ?", "b")]))
    content = json.loads(Path(source.path).read_text())
    change(content)
    Path(source.path).write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        found(source)
    assert str(caught.value) == source.path + message


def test_a_file_that_is_no_json_is_refused(tmp_path):
    source = squad(tmp_path / "a.json", ("a", [entry("x", "what ?", "b")]))
    for content in (b"{", b'{"a": "\xff"}'):
        Path(source.path).write_bytes(content)
        with pytest.raises(DataError, match=r"a\.json: not JSON: "):
            found(source)


@pytest.mark.parametrize(
    ("answers", "keys", "message"),
    [
        ("[1]", ["a", "b"], "answers.json: 1 entries, but {path} has 2 questions"),
        ('{"a": 1}', ["a", "b"], "answers.json: an object, but {path} has 2 questions"),
        ("[1, 2]", ["a", 2], "{path}: its questions need an id each, all texts or all numbers"),
    ],
)
def test_answer_files_that_do_not_fit_are_refused(tmp_path, answers, keys, message):
    (tmp_path / "answers.json").write_text(answers)
    groups = [("a", [entry(key, "q ?", "b") for key in keys])]
    source = squad(tmp_path / "a.json", *groups, answers=str(tmp_path / "answers.json"))
    with pytest.raises(DataError) as caught:
        found(source)
    assert str(caught.value).endswith(message.format(path=source.path))


def test_an_answer_file_of_several_files_is_refused(tmp_path):
    for name in ("a", "b"):
        source = squad(tmp_path / f"{name}.json", ("a", [entry("x", "q ?", "b")]))
    several = source.model_copy(update={"path": str(tmp_path), "answers": "c.json"})
    with pytest.raises(ConfigError, match=r"2 files, but `answers` is the answer file of one"):
        found(several)


# Rows.


def data_of(where: Path, count: int = 60, **changes) -> Data:
    """Two tasks on the same contexts of 1 to 12 words: the last word of them, and the first."""
    sources = []
    for domain, end in (("up", -1), ("down", 0)):
        contexts = [[WORDS[(n * k) % 16] for k in range(1, 2 + n % 12)] for n in range(count)]
        rows = [
            {"context": f"{' '.join(words)} {n}", "question": f"{domain} ?", "answer": words[end]}
            for n, words in enumerate(contexts)
        ]
        source = write_lines(where / f"{domain}.jsonl", rows)
        sources.append(source.model_copy(update={"domain": domain}))
    values = {
        "objective": "causal",
        "questions": Questions(task_tokens=TASKS, room=6),
        "sources": sources,
        "tokenizer": TrainedTokenizer(vocab_size=320),
        "validation_fraction": 0.3,
        "block_size": 40,
        "folder": where / "data",
    }
    return Data(**(values | changes))


def opened(data: Data):
    return open_prepared(prepare(data))


def test_each_question_is_one_row(tmp_path, capsys):
    data = data_of(tmp_path)
    prepared = opened(data)
    tokenizer = prepared.tokenizer
    assert prepared.domains == ["up", "down"] and prepared.classes is None
    names = ["__ans__", "__up__", "__down__"]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert ids == [4, 5, 6] and tokenizer.convert_tokens_to_ids("<mask>") == 319
    end, rows = tokenizer.eos_token_id, {}
    for split in (prepared.train, prepared.validation):
        domains = split.domains_B(np.arange(len(split))).tolist()
        for row, domain in zip(all_rows(split), domains, strict=True):
            assert row.count(4) == 1 and row[-1] == end and not {5, 6} & set(row)
            asked, answer = row[: row.index(4)], row[row.index(4) + 1 : -1]
            rows[tokenizer.decode(asked)] = (tokenizer.decode(answer), domain)
    want = {
        question.context + question.text: (question.answers[0], domain)
        for domain, source in enumerate(data.sources)
        for question in questions(source)
    }
    assert rows == want
    # equal contexts and other questions: each is held out by itself
    assert 20 < len(prepared.validation) < 55
    assert "are cut" not in capsys.readouterr().out


def test_what_is_cut_is_said(tmp_path, capsys):
    data = data_of(tmp_path, block_size=14)
    prepared = opened(data)
    tokenizer = prepared.tokenizer
    encode = QuestionEncoder(data, tokenizer)
    every = [question for source in data.sources for question in questions(source)]

    def tokens(text: str) -> int:
        return len(tokenizer(text).input_ids) - 1  # without the begin token

    parts = [(tokens(q.context), tokens(q.text), tokens(q.answers[0])) for q in every]
    cut = sum(
        context > 14 - question - 1 - max(6, answer + 1) for context, question, answer in parts
    )
    assert {len(row) for row in encode(every)} <= set(range(15))
    assert encode.cut == cut > 20 and encode.answers_cut == 0
    assert f"data.block_size: {cut} of {len(every)} rows are cut" in capsys.readouterr().out
    prompts = encode.prompts(every)
    assert max(map(len, prompts)) == 14 - 6
    for row, prompt in zip(encode(every), prompts, strict=True):
        begin = row.tolist().index(4) + 1
        assert prompt.tolist() == row[:begin].tolist() or len(row) - begin > 6


def test_a_question_that_is_too_long_is_refused_by_its_place(tmp_path):
    data = data_of(tmp_path, block_size=10)
    source = write_lines(tmp_path / "long.jsonl", [{"question": "the " * 9, "answer": "a"}])
    source = source.model_copy(update={"domain": "up"})
    with pytest.raises(DataError) as caught:
        opened(data.model_copy(update={"sources": [*data.sources, source]}))
    told = f"{source.path}:1: its question of "
    assert str(caught.value).startswith(told)


def test_only_the_rows_settings_name_the_folder(tmp_path):
    data = data_of(tmp_path)
    folder = prepare(data)
    again = data.questions.model_copy(update={"modelling": True})
    assert prepare(data.model_copy(update={"questions": again})) == folder
    for changes in (
        {"room": 7}, {"answer_token": "__a__"},
        {"task_tokens": dict(reversed(TASKS.items()))}, {"task_tokens": {}},
    ):  # fmt: skip
        other = data.questions.model_copy(update=changes)
        assert prepare(data.model_copy(update={"questions": other})) != folder, changes


def test_names_of_the_tokens_in_a_text_are_text(tmp_path):
    data = data_of(tmp_path)
    tokenizer = opened(data).tokenizer
    text = {"context": "a __ans__ b", "question": "__up__ ?", "answer": "__ans__ </s>"}
    (row,) = QuestionEncoder(data, tokenizer)(
        list(questions(write_lines(tmp_path / "names.jsonl", [text])))
    )
    assert row.tolist().count(4) == 1 and 5 not in row
    assert row.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row) == "a __ans__ b__up__ ?__ans____ans__ </s></s>"


def test_a_pretrained_tokenizer_gets_the_tokens_behind_its_own(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(WORDS[n:]) for n in range(9)))
    plain = Data(objective="causal", sources=[TextSource(kind="text", path=str(text))])
    plain = plain.model_copy(update={"tokenizer": TrainedTokenizer(vocab_size=310)})
    load_tokenizer(plain, [text.read_text()]).save_pretrained(tmp_path / "plain")
    stored = PretrainedTokenizer(kind="pretrained", path=str(tmp_path / "plain"))
    data = data_of(tmp_path, tokenizer=stored)
    prepared = opened(data)
    size = len(load_tokenizer(plain.model_copy(update={"tokenizer": stored}), ()))
    vocabulary = prepared.tokenizer.get_vocab()
    assert [vocabulary[n] for n in ("__ans__", "__up__", "__down__")] == [size, size + 1, size + 2]
    assert {size, prepared.tokenizer.eos_token_id} <= set(all_rows(prepared.train)[0])
    # what has them already is left as it is
    prepared.tokenizer.save_pretrained(tmp_path / "with")
    again = stored.model_copy(update={"path": str(tmp_path / "with")})
    assert opened(data.model_copy(update={"tokenizer": again})).folder == prepared.folder
    for token, why in (("</s>", "for something else"), ("a", "as a piece of text")):
        questions_of = data.questions.model_copy(update={"answer_token": token})
        told = rf"^data\.questions: data\.tokenizer\.path: .* has '{token}' {why}; name another"
        with pytest.raises(ConfigError, match=told):
            load_tokenizer(data.model_copy(update={"questions": questions_of}), ())


def test_batches_of_questions_and_of_texts_of_their_tasks(tmp_path):
    data = data_of(tmp_path)
    prepared = opened(data)
    both = data.questions.model_copy(update={"modelling": True})
    view = view_for(data.model_copy(update={"questions": both}), prepared.tokenizer, 0)
    ids = np.array([0, len(prepared.train) - 1, 3])
    batch = make_batch(prepared.train, view, ids, ids * 0)
    rows = all_rows(prepared.train)
    assert batch.row_ids_B.tolist() == [*ids, *ids]
    assert batch.domains_B.tolist() == [0, 1, 0] * 2
    assert batch.ids_BT[3:, 0].tolist() == [5, 6, 5]
    assert batch.lengths_B.tolist() == [len(rows[n]) for n in ids] * 2
    answers = [len(rows[n]) - rows[n].index(4) - 1 for n in ids]
    assert batch.counts_B.tolist() == [*answers, *(len(rows[n]) for n in ids)]
    written = batch.labels_N[sum(answers) :].tolist()
    assert written == [token for n in ids for token in rows[n]]
    alone = make_batch(prepared.train, view_for(data, prepared.tokenizer, 0), ids, ids * 0)
    assert alone.counts_B.tolist() == answers and not alone.columns
    assert (alone.labels_BT[alone.mask_BT == 0] == IGNORE).all()


def test_the_rows_of_a_step_are_sorted_by_length(tmp_path):
    data = data_of(tmp_path)
    prepared = opened(data)
    view = view_for(data, prepared.tokenizer, 0)
    loader = Loader(prepared.train, view, batch=16, micro_batch=4, rank=0, world=1, seed=0)
    step = [sent.batch for sent in loader.next_step()]
    loader.close()
    lengths = [n for batch in step for n in batch.lengths_B.tolist()]
    assert lengths == sorted(lengths) and len(set(lengths)) > 4
