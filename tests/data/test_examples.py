"""Examples from CSV, TSV, JSON lines and tables: the same ones, and refused by file and row."""

import gzip
import json
from pathlib import Path

import pytest

from dskd.data.examples import Example, examples
from dskd.errors import DataError
from dskd.settings.data import HubSource, JsonlSource
from dskd.settings.labels import CsvSource, TsvSource

WANT = [("a cat, small", "pets"), ('so "they" say', "talk"), ("  old wall ", "pets")]
COLUMNS = {"field": "text", "label": "label"}


def write(path: Path, lines: list[str], *, packed: bool = False) -> str:
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


def found(source) -> list[tuple]:
    return [(example.text, example.label) for example in examples(source)]


CSV = [
    "id,text,label",
    '1,"a cat, small",pets',
    '2,"so ""they"" say",talk',
    "",
    "3,  old wall ,pets",
]
TSV = [
    "label\tid\ttext",
    "pets\t1\ta cat, small",
    'talk\t2\tso "they" say',
    "",
    "pets\t3\t  old wall ",
]
JSONL = [json.dumps({"text": text, "n": 1, "label": label}) for text, label in WANT]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "lines"), [(CsvSource, CSV), (TsvSource, TSV), (JsonlSource, JSONL)]
)
def test_the_same_examples_from_every_kind_of_file(tmp_path, kind, lines, packed):
    name = kind.model_fields["kind"].annotation.__args__[0]
    path = write(tmp_path / (f"a.{name}.gz" if packed else f"a.{name}"), lines, packed=packed)
    source = kind(kind=name, path=path, **COLUMNS)
    assert found(source) == WANT
    last = len(lines)
    assert [example.place for example in examples(source)][-1] == f"{path}:{last}"
    assert len(found(source.model_copy(update={"documents": 2}))) == 2
    if not packed:
        assert found(kind(kind=name, path=str(tmp_path), **COLUMNS)) == WANT  # as a folder


@pytest.mark.parametrize(
    ("kind", "lines", "columns"),
    [
        (CsvSource, CSV, ["id", "text", "label"]),
        (TsvSource, TSV, ["label", "id", "text"]),
    ],
)
def test_files_without_a_header(tmp_path, kind, lines, columns):
    name = kind.model_fields["kind"].annotation.__args__[0]
    path = write(tmp_path / f"a.{name}", lines[1:])
    source = kind(kind=name, path=path, columns=columns, **COLUMNS)
    assert found(source) == WANT
    assert next(examples(source)).place == f"{path}:1"
    with pytest.raises(DataError, match=rf"a\.{name}:1: 3 cells, but there are 4 columns"):
        found(source.model_copy(update={"columns": [*columns, "more"]}))
    write(tmp_path / f"a.{name}", lines)
    with pytest.raises(DataError, match=rf"a\.{name}:1: names its columns; leave `columns` out"):
        found(source)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "datasets"])
def test_empty_texts_are_refused_or_skipped_and_counted(tmp_path, table_cache, kind):
    rows = [("a", "b", "x"), ("", "b", "x"), ("c", None, "y"), ("d", " ", "y"), ("e", "f", "y")]
    named = [dict(zip(("one", "two", "label"), row, strict=True)) for row in rows]
    lines = [json.dumps(row) for row in named]
    if kind != "jsonl":
        lines = ["one,two,label", *(",".join(cell or "" for cell in row) for row in rows)]
    path = write(tmp_path / f"a.{kind}", lines)
    columns = {"kind": kind, "field": "one", "pair": "two", "label": "label"}
    where = {"path": "csv", "data_files": [path]} if kind == "datasets" else {"path": path}
    source = {"jsonl": JsonlSource, "csv": CsvSource, "datasets": HubSource}[kind](
        **columns, **where
    )
    with pytest.raises(DataError, match=r"empty text in column 'one'|no text in column 'one' but"):
        found(source)
    skipping = source.model_copy(update={"on_bad_rows": "skip"})
    skipped = []
    taken = list(examples(skipping, skipped=lambda: skipped.append(1)))
    assert [example.texts for example in taken] == [("a", "b"), ("e", "f")] and len(skipped) == 3


def test_arrays_and_nested_keys(tmp_path):
    rows = [{"doc": {"text": text}, "is": {"a": {"label": label}}} for text, label in WANT]
    path = write(tmp_path / "a.json", [json.dumps(rows, indent=1)])
    source = JsonlSource(kind="jsonl", path=path, field="doc.text", label="is.a.label")
    assert found(source) == WANT
    assert next(examples(source)).place == f"{path}: element 0"


def test_nested_classes_of_a_table_have_their_names(tmp_path, table_cache):
    import datasets

    names = datasets.ClassLabel(names=["talk", "pets"])
    features = datasets.Features({"doc": {"text": datasets.Value("string"), "label": names}})
    rows = {"doc": [{"text": "a", "label": 1}, {"text": "b", "label": 0}]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    columns = {"field": "doc.text", "label": "doc.label"}
    saved = HubSource(kind="datasets", path=str(tmp_path / "saved"), **columns)
    assert found(saved) == [("a", "pets"), ("b", "talk")]


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_name_their_classes(tmp_path, table_cache, streaming):
    import datasets

    path = write(tmp_path / "a.jsonl", JSONL)
    about = {"kind": "datasets", "path": "json", "data_files": [path], "streaming": streaming}
    assert found(HubSource(**about, **COLUMNS)) == WANT
    if not streaming:
        names = datasets.ClassLabel(names=["talk", "pets"])
        columns = {"text": [text for text, _ in WANT], "label": [1, 0, -1]}
        features = datasets.Features({"text": datasets.Value("string"), "label": names})
        datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "saved")
        saved = HubSource(kind="datasets", path=str(tmp_path / "saved"), **COLUMNS)
        with pytest.raises(DataError, match=r"row 2: nothing in column 'label'; rows without a la"):
            found(saved)
        some = saved.model_copy(update={"unlabelled": True})
        assert [label for _, label in found(some)] == ["pets", "talk", None]


def test_cells_may_span_lines_and_keep_their_place(tmp_path):
    path = write(tmp_path / "a.csv", ["text,label", '"one', 'two",x', "three,y"])
    source = CsvSource(kind="csv", path=path, **COLUMNS)
    assert list(examples(source)) == [
        Example("one\ntwo", None, "x", f"{path}:2"),
        Example("three", None, "y", f"{path}:4"),
    ]


def test_a_tsv_may_be_quoted(tmp_path):
    path = write(tmp_path / "a.tsv", ["text\tlabel", '"a\tb"\tx'])
    quoted = TsvSource(kind="tsv", path=path, quoting=True, **COLUMNS)
    assert found(quoted) == [("a\tb", "x")]
    with pytest.raises(DataError, match=r"a\.tsv:2: 3 cells, but there are 2 columns$"):
        found(quoted.model_copy(update={"quoting": False}))


def test_pairs_and_numbers(tmp_path):
    lines = [{"a": "x", "b": "y", "score": 4}, {"a": "x", "b": "z", "score": "2.5"}]
    path = write(tmp_path / "a.jsonl", [json.dumps(line) for line in lines])
    source = JsonlSource(kind="jsonl", path=path, field="a", pair="b", target="score")
    assert [example[:3] for example in examples(source)] == [("x", "y", 4.0), ("x", "z", 2.5)]


def test_whole_numbers_are_names_of_classes(tmp_path):
    large = 2**60 + 1  # a float would not keep it
    path = write(tmp_path / "a.jsonl", [f'{{"text": "x", "label": {n}}}' for n in (7, large)])
    assert found(JsonlSource(kind="jsonl", path=path, **COLUMNS)) == [("x", "7"), ("x", str(large))]


def test_a_missing_label_is_one_where_the_settings_say_so(tmp_path):
    path = write(tmp_path / "a.tsv", ["text\tlabel", "a\tx", "b\t"])
    source = TsvSource(kind="tsv", path=path, **COLUMNS)
    with pytest.raises(DataError, match=r"a\.tsv:3: nothing in column 'label'; .*`unlabelled: tru"):
        found(source)
    assert found(source.model_copy(update={"unlabelled": True})) == [("a", "x"), ("b", None)]
    assert found(source.model_copy(update={"label": None})) == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("row", "target", "message"),
    [
        ({"text": "x"}, False, "1: no value under the key 'label'; its keys are ['text']"),
        (["x"], False, "1: no value under the key 'text'; it is no object but a list"),
        ({"text": " ", "label": "x"}, False, "1: empty text in column 'text'"),
        ({"text": 5, "label": "x"}, False, "1: no text in column 'text' but a number"),
        ({"text": None, "label": "x"}, False, "1: no text in column 'text' but null"),
        ({"text": "x", "label": 0.5}, False,
         "1: the label in column 'label' is neither text nor a whole number but a number; for "
         "regression, name it `target`"),
        ({"text": "x", "label": True}, False,
         "1: the label in column 'label' is neither text nor a whole number but a boolean"),
        ({"text": "x", "label": ["a"]}, False,
         "1: the label in column 'label' is neither text nor a whole number but a list"),
        ({"text": "x", "label": "high"}, True,
         "1: the target in column 'label' is no number: 'high'"),
        ({"text": "x", "label": float("nan")}, True,
         "1: the target in column 'label' is no number: nan"),
        ({"text": "x", "label": True}, True,
         "1: the target in column 'label' is no number: True"),
    ],
)  # fmt: skip
def test_rows_that_are_no_examples(tmp_path, row, target, message):
    path = write(tmp_path / "a.jsonl", [json.dumps(row)])
    columns = {"target" if target else "label": "label"}
    with pytest.raises(DataError) as error:
        found(JsonlSource(kind="jsonl", path=path, **columns))
    assert str(error.value) == f"{path}:{message}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], ": empty; its first line names its columns"),
        (["text,label"], "data.sources: csv: {path}: no row in it"),
        (["text,class", "a,b"], ":1: no column 'label'; its columns are ['text', 'class']"),
        (["text,label,label", "a,b,c"],
         ":1: more than one column 'label'; its columns are ['text', 'label', 'label']"),
        (["text,label", "a,b", "c"], ":3: 1 cells, but there are 2 columns"),
        (["text,label", "a,b", '"c,d', "e,f"],
         ":3: cannot be read as cells: unexpected end of data"),
    ],
)  # fmt: skip
def test_files_that_are_no_tables(tmp_path, lines, message):
    path = write(tmp_path / "a.csv", lines)
    with pytest.raises(DataError) as error:
        found(CsvSource(kind="csv", path=path, **COLUMNS))
    whole = message.format(path=path)
    assert str(error.value) == (whole if "data.sources" in whole else f"{path}{whole}")


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "a.csv.gz"
    write(path, CSV * 50, packed=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.csv\.gz: cannot be unpacked, it is damaged \("):
        found(CsvSource(kind="csv", path=str(path), **COLUMNS))
