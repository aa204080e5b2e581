"""Labelled rows: their classes, tokens, types and numbers, and the order within a step."""

import json
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dskd.batch import IGNORE, TARGETS, UNLABELLED
from dskd.data import preparing
from dskd.data.counter import below
from dskd.data.labelled import parts_of
from dskd.data.loader import Loader, make_batch
from dskd.data.prepared import open_prepared, prepare
from dskd.data.views import LabelView
from dskd.errors import ConfigError, DataError
from dskd.settings.data import Data, JsonlSource, PretrainedTokenizer, TrainedTokenizer
from dskd.settings.labels import LabelPart
from tests.data.conftest import WORDS, all_rows
from tests.data.row_batches import PlainRows
from tests.goldens import golden

CLASSES = ["Zoo", "art", "law", "sea"]  # by code point: capitals come first


def lines(count: int = 60, seed: int = 0, **more) -> list[dict]:
    """Examples of 1..12 words, class and number by turns, in no order of either."""
    return [
        {
            "text": " ".join(WORDS[below(16, seed, i, w)] for w in range(1 + below(12, seed, 7, i)))
            + f" {i}",
            "label": CLASSES[-1 - i % 4],
            "score": i / 8,
            **{name: make(i) for name, make in more.items()},
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(where: Path, rows: list[dict], columns: dict | None = None, **changes) -> Data:
    path = write(where / "rows.jsonl", rows)
    columns = {"label": "label"} if columns is None else columns
    values = {
        "objective": "classification",
        "sources": [JsonlSource(kind="jsonl", path=path, **columns)],
        "tokenizer": TrainedTokenizer(vocab_size=300),
        "validation_fraction": 0.3,
        "block_size": 16,
        "folder": where / "data",
    }
    return Data(**(values | changes))


def opened(*args, **changes):
    return open_prepared(prepare(data_of(*args, **changes)))


def labels_of(rows) -> list[int]:
    every = np.arange(len(rows))
    return rows.rows(every, every * 0).labels_B.tolist()


@pytest.mark.parametrize("case", golden("labels")["split_labels"], ids=lambda case: case["name"])
def test_parts_of_the_classes_are_the_originals(case):
    names, count = list(map(str, case["inputs"]["labels"])), case["inputs"]["n_teachers"]
    want = [list(map(str, part)) for part in case["expect"]["subsets"]]
    assert parts_of(names, count) == want
    assert parts_of(names[::-1], count) == want


def test_each_example_is_one_row_with_its_class(tmp_path):
    rows = lines()
    prepared = opened(tmp_path, rows)
    assert prepared.classes == CLASSES
    tokenizer = prepared.tokenizer
    want = {r["text"]: CLASSES.index(r["label"]) for r in rows}
    found = {}
    for split in (prepared.train, prepared.validation):
        assert split.labelled
        for row, label in zip(all_rows(split), labels_of(split), strict=True):
            assert row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.eos_token_id
            found[tuple(row)] = label

    def ids(text):
        return tuple(tokenizer(text, truncation=True, max_length=16).input_ids)

    assert found == {ids(text): label for text, label in want.items()}
    assert 5 < len(prepared.validation) < 30


def test_long_texts_are_cut_as_huggingface_cuts_them(tmp_path, capsys):
    rows = lines(pair=lambda i: " ".join(WORDS[: i % 16]) + " ?")
    columns = {"label": "label", "pair": "pair"}
    prepared = opened(tmp_path, rows, columns, block_size=24)
    want = {}
    tokenizer = prepared.tokenizer
    for row in rows:
        made = tokenizer(row["text"], row["pair"], truncation=True, max_length=24)
        want[tuple(made.input_ids)] = made.token_type_ids
    assert {len(ids) for ids in want} >= {24}
    found = {}
    for split in (prepared.train, prepared.validation):
        every = np.arange(len(split))
        batch = make_batch(split, LabelView(), every, every * 0)
        for ids, types, length in zip(batch.ids_BT, batch.types_BT, batch.lengths_B, strict=True):
            assert not types[length:].any()
            found[tuple(ids[:length].tolist())] = types[:length].tolist()
    assert found == want
    cut = sum(len(tokenizer(r["text"], r["pair"]).input_ids) > 24 for r in rows)
    assert f"data.block_size: {cut} of 60 rows are cut at 24 tokens" in capsys.readouterr().out


def test_stretches_do_not_show(tmp_path, monkeypatch):
    whole = opened(tmp_path, lines())
    monkeypatch.setattr(preparing, "_CHUNK_CHARACTERS", 100)
    pieces = opened(tmp_path, lines(), folder=tmp_path / "pieces")
    assert pieces.folder != whole.folder and pieces.fingerprint == whole.fingerprint


def test_rows_of_one_text_have_no_types(tmp_path):
    rows = opened(tmp_path, lines()).train
    batch = make_batch(rows, LabelView(), np.arange(4), np.zeros(4, np.int64))
    assert batch.types_BT is None


def test_a_batch_has_one_position_a_row(tmp_path):
    rows = opened(tmp_path, lines()).train
    batch = make_batch(rows, LabelView(), np.arange(6), np.zeros(6, np.int64))
    assert batch.counts_B.tolist() == [1] * 6
    assert batch.labels_N.tolist() == labels_of(rows)[:6]
    width = batch.ids_BT.shape[1]
    assert batch.positions_N.tolist() == [width * b for b in range(6)]
    assert (batch.labels_BT[:, 1:] == IGNORE).all()
    assert not batch.columns


def test_rows_without_a_label_are_positions_too(tmp_path):
    rows = lines()
    for row in rows[::3]:
        row["label"] = None
    with pytest.raises(DataError, match=r"rows\.jsonl:1: nothing in column 'label'; "):
        opened(tmp_path, rows)
    prepared = opened(tmp_path, rows, {"label": "label", "unlabelled": True})
    found = labels_of(prepared.train) + labels_of(prepared.validation)
    assert found.count(UNLABELLED) == 20 and len(found) == 60
    batch = make_batch(prepared.train, LabelView(), np.arange(9), np.zeros(9, np.int64))
    assert batch.labels_N.tolist() == labels_of(prepared.train)[:9]
    assert UNLABELLED in batch.labels_N and batch.supervised == 9


def test_numbers_are_a_column(tmp_path):
    rows = lines()
    rows[4]["score"] = None
    prepared = opened(tmp_path, rows, {"target": "score", "unlabelled": True})
    assert prepared.classes == []
    columns, labels = [], []
    for split in (prepared.train, prepared.validation):
        every = np.arange(len(split))
        batch = make_batch(split, LabelView(), every, every * 0)
        assert batch.columns[TARGETS].dtype == torch.float32
        columns += batch.columns[TARGETS].tolist()
        labels += batch.labels_N.tolist()
    missing = [label for label, number in zip(labels, columns, strict=True) if isnan(number)]
    assert missing == [UNLABELLED] and labels.count(0) == 59
    want = sorted(row["score"] for row in rows if row["score"] is not None)
    assert sorted(number for number in columns if not isnan(number)) == want


# Which classes.


def test_a_subset_is_of_the_same_tokens_and_split(tmp_path):
    rows = lines()
    whole = opened(tmp_path, rows)
    part = opened(tmp_path, rows, labels=["sea", "art"])
    assert part.folder != whole.folder and part.classes == ["art", "sea"]
    assert part.tokenizer_fingerprint == whole.tokenizer_fingerprint
    for mine, theirs in ((part.train, whole.train), (part.validation, whole.validation)):
        kept = [
            (row, CLASSES[label])
            for row, label in zip(all_rows(theirs), labels_of(theirs), strict=True)
            if CLASSES[label] in ("art", "sea")
        ]
        named = [part.classes[label] for label in labels_of(mine)]
        assert list(zip(all_rows(mine), named, strict=True)) == kept


def test_parts_are_taken_by_number(tmp_path):
    parts = [opened(tmp_path, lines(), labels=LabelPart(part=n, of=2)) for n in range(2)]
    assert [part.classes for part in parts] == [["Zoo", "art"], ["law", "sea"]]
    assert parts[0].fingerprint != parts[1].fingerprint


def test_the_names_of_classes_are_part_of_the_rows(tmp_path):
    rows = lines()
    first = opened(tmp_path, rows)
    for row in rows:
        row["label"] += "!"
    other = opened(tmp_path, rows)
    assert labels_of(first.train) == labels_of(other.train)
    assert first.train.fingerprint != other.train.fingerprint
    assert first.train.content != other.train.content


def test_sources_without_labels_get_their_classes_by_name(tmp_path):
    prepared = opened(tmp_path, lines(), {}, labels=["b", "a", "c"])
    assert prepared.classes == ["a", "b", "c"]
    assert set(labels_of(prepared.train)) == {UNLABELLED}


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["sea", "low"], ConfigError,
         "data.labels: 'low' is the label of no row of data.sources; did you mean 'law'?; theirs "
         "are 'Zoo', 'art', 'law', 'sea'"),
        (LabelPart(part=0, of=3), ConfigError,
         "data.labels: part 0 of 3 is ['Zoo'], of 4 classes: there is nothing to tell apart"),
    ],
)  # fmt: skip
def test_classes_that_there_are_not(tmp_path, labels, error, message):
    with pytest.raises(error) as found:
        opened(tmp_path, lines(), labels=labels)
    assert str(found.value) == message


def test_too_few_classes_are_refused(tmp_path):
    nothing = [row | {"label": None} for row in lines()]
    with pytest.raises(DataError, match=r"^data\.sources: no row has a label; name the classes in"):
        opened(tmp_path, nothing, {"label": "label", "unlabelled": True})
    with pytest.raises(DataError, match=r"^data\.sources: 'sea' is the only label; it takes two"):
        opened(tmp_path, lines()[::4])


def test_a_label_of_validation_alone_is_refused_by_row(tmp_path):
    path = write(tmp_path / "valid.jsonl", [{"text": "x", "label": "sea"}, lines()[0], {
        "text": "y", "label": "sky"}])  # fmt: skip
    validation = [JsonlSource(kind="jsonl", path=path, label="label")]
    with pytest.raises(DataError) as error:
        opened(tmp_path, lines(), validation=validation)
    assert str(error.value) == (
        f"{path}:3: the label 'sky' is that of no row of data.sources; theirs are 'Zoo', 'art', "
        "'law', 'sea'"
    )


def test_a_class_that_is_left_out_may_be_in_validation(tmp_path):
    path = write(tmp_path / "valid.jsonl", lines(8, seed=3))
    validation = [JsonlSource(kind="jsonl", path=path, label="label")]
    prepared = opened(tmp_path, lines(), validation=validation, labels=["art", "law"])
    assert len(prepared.validation) == 4


def test_another_template_is_another_folder(tmp_path):
    stored = opened(tmp_path, lines()).folder / "tokenizer"
    first = PreTrainedTokenizerFast.from_pretrained(stored)
    other = PreTrainedTokenizerFast.from_pretrained(stored)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 0)]
    )
    found = []
    for name, tokenizer in (("first", first), ("other", other)):
        tokenizer.save_pretrained(tmp_path / name)
        chosen = PretrainedTokenizer(kind="pretrained", path=str(tmp_path / name))
        found.append(opened(tmp_path, lines(), tokenizer=chosen))
    assert found[0].folder != found[1].folder
    assert found[0].tokenizer_fingerprint == found[1].tokenizer_fingerprint
    assert [all_rows(one.train)[0].count(0) for one in found] == [1, 2]


# The order within a step.


class LabelledRows(PlainRows):
    by_length = True

    def rows(self, row_ids_B, epochs_B):
        lengths_B = self.lengths_R[row_ids_B]
        width = min(-(-int(lengths_B.max()) // 8) * 8, self.block_size)
        rows = super().rows(row_ids_B, epochs_B)
        return rows._replace(
            tokens_BT=rows.tokens_BT[:, :width], labels_B=row_ids_B % 3, seconds_B=lengths_B
        )

    def lengths_B(self, row_ids_B):
        return self.lengths_R[row_ids_B]


@pytest.fixture(scope="module")
def log_normal() -> LabelledRows:
    """3000 rows of 47 tokens in the mean, at most 128."""
    random = np.random.RandomState(0)
    lengths_R = np.exp(random.normal(np.log(47) - 0.2, 0.75, 3000)).round().clip(3, 128)
    rows = LabelledRows(np.ones((3000, 128), np.int64), lengths_R.astype(np.int64))
    assert rows.lengths_R.mean() == pytest.approx(47, abs=1)
    return rows


def steps(rows, count: int, **how):
    loader = Loader(rows, LabelView(), **({"rank": 0, "world": 1, "seed": 3} | how))
    try:
        return [[sent.batch for sent in loader.next_step()] for _ in range(count)]
    finally:
        loader.close()


def test_little_of_a_batch_is_padding(log_normal):
    def padding(**how):
        found = [b for step in steps(log_normal, 40, **how) for b in step]
        return 1 - sum(b.tokens for b in found) / sum(b.ids_BT.numel() for b in found)

    sizes = {"batch": 64, "micro_batch": 8}
    assert padding(**sizes) < 0.2
    by_rank = [padding(**sizes, world=2, rank=rank) for rank in range(2)]
    assert max(by_rank) < 0.2
    log_normal.by_length = False  # as drawn
    try:
        assert padding(**sizes) > 0.5
    finally:
        log_normal.by_length = True


@pytest.mark.parametrize(("world", "micro"), [(1, 16), (2, 8), (2, 2), (4, 4)])
def test_a_step_has_the_same_rows_for_every_geometry(log_normal, world, micro):
    plain = PlainRows(log_normal.ids_RT, log_normal.lengths_R)
    plain.rows, drawn = log_normal.rows, []
    for step in steps(plain, 5, batch=16, micro_batch=16):
        drawn.append(sorted(step[0].row_ids_B.tolist()))
    how = {"batch": 16, "micro_batch": micro, "world": world}
    ranks = [steps(log_normal, 5, **how, rank=rank) for rank in range(world)]
    for n, want in enumerate(drawn):
        rounds = zip(*(rank[n] for rank in ranks), strict=True)
        batches = [batch for one in rounds for batch in one]
        lengths = torch.cat([batch.lengths_B for batch in batches]).tolist()
        assert lengths == sorted(lengths)
        assert sorted(torch.cat([batch.row_ids_B for batch in batches]).tolist()) == want
