"""Sources: what they read, in which order, and what they refuse."""

import json
from functools import partial
from pathlib import Path

import pytest

from dskd.data.sources import content_hash, documents, size
from dskd.errors import ConfigError, DataError
from dskd.settings.data import HubSource, JsonlSource, TextSource


def text(path: Path | str, **more: object) -> TextSource:
    return TextSource(kind="text", path=str(path), **more)


def jsonl(path: Path, **more: object) -> JsonlSource:
    return JsonlSource(kind="jsonl", path=str(path), **more)


def test_text_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \r\nthree\r\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("last")  # no line end
    (tmp_path / "a.txt").write_text("\n\nfirst\n\n\n")
    (tmp_path / "a.md").write_text("not read")
    want = ["first", "one\ntwo", "three", "last"]
    assert list(documents(text(tmp_path))) == want
    assert list(documents(text(tmp_path / "**" / "*.txt"))) == want
    assert list(documents(text(tmp_path / "b.txt"))) == ["one\ntwo", "three"]
    assert list(documents(text(tmp_path, documents=2))) == want[:2]


def test_reading_reports_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n" * 10)
    (tmp_path / "b.txt").write_text("three")
    seen: list[int] = []
    list(documents(text(tmp_path), seen.append))
    assert sum(seen) == size(text(tmp_path)) == 95


@pytest.mark.parametrize("path", ["missing.txt", "*.none", "empty_folder"])
def test_missing_text_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(DataError, match="data.sources: text: .*" + path.replace("*", r"\*")):
        list(documents(text(tmp_path / path)))


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n\t\n")
    with pytest.raises(DataError, match=r"a\.txt: no text in it"):
        list(documents(text(tmp_path / "a.txt")))


def test_not_utf8_names_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"plain line\nna\xefve line\n")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 at byte 13 \(line 2\)"):
        list(documents(text(tmp_path / "latin.txt")))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\ntwo"}, {"text": "drei \u00fc"}, {"text": "  "}, {"text": "four"}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert list(documents(jsonl(tmp_path))) == ["one\ntwo", "drei \u00fc", "four"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "not JSON"),
        ('{"body": "a", "id": 3}', r"no text under the key 'text'; its keys are \['body', 'id'\]"),
        ('{"text": 5}', "no text under the key 'text'"),
        ('["a"]', "no text under the key 'text'; it is no object"),
        ('{"text": "a \\ud800"}', "not Unicode text"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: " + problem):
        list(documents(jsonl(path)))


def test_lines_and_whole_files_as_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n two\r\n\r\n \r\nthree\r\n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("last")
    assert list(documents(text(tmp_path))) == ["one\n two", "three", "last"]
    assert list(documents(text(tmp_path, per="line"))) == ["one", " two", "three", "last"]
    assert list(documents(text(tmp_path, per="line", documents=2))) == ["one", " two"]
    assert list(documents(text(tmp_path, per="file"))) == ["one\n two\n\n \nthree", "last"]
    for per in ("line", "file"):
        with pytest.raises(DataError, match=r"b\.txt: no text in it"):
            list(documents(text(tmp_path / "b.txt", per=per)))


ROWS = [
    {"text": "one\ntwo", "n": 10**400},
    {"text": "drei \u00fc"},
    {"text": " "},
    {"text": "four"},
]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n \n" + json.dumps(ROWS, indent=indent) + "\n")
    assert list(documents(jsonl(path))) == ["one\ntwo", "drei \u00fc", "four"]
    assert list(documents(jsonl(path, documents=1))) == ["one\ntwo"]
    path.write_text("[]")
    with pytest.raises(DataError, match=r"a\.json: no text in it"):
        list(documents(jsonl(path)))


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        ('[{"text": "a"}, {"body": "b"}]', r": element 1: no text under the key 'text'; its keys"),
        ('[{"text": "a"}, ["b"]]', r": element 1: no text .*; it is no object but a list"),
        ('[{"text": "a"},\n\n {"text": }]', r": element 1: not JSON: .*line 3 column 11"),
        ('[{"text": "a"},]', r": element 1: not JSON"),
        ('[{"text": "a"}', r": not JSON: its array does not end behind element 0"),
        ('[{"text": "a"} {"text": "b"}]', r": not JSON: its array does not end behind element 0"),
        ('[{"text": "a"}]\n{"text": "b"}', r": more text behind the end of its array"),
        ('[{"text": ' + "[" * 50_000 + "]" * 50_000 + "}]", r": element 0: nested too deep"),
    ],
)
def test_bad_json_array_is_named(tmp_path: Path, array: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(array)
    with pytest.raises(DataError, match=r"a\.jsonl" + problem):
        list(documents(jsonl(tmp_path)))


def test_nested_keys(tmp_path: Path) -> None:
    rows = [{"doc": {"text": "one", "of": {"x": 1}}}, {"doc.text": "two", "doc": 3}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(documents(jsonl(path, field="doc.text"))) == ["one", "two"]
    for field, problem in (
        (
            "doc.body",
            r":1: no text under the key 'doc.body'; the keys of 'doc' are \['of', 'text'\]",
        ),
        ("doc.text.a", r":1: .*'doc.text.a'; 'doc.text' is no object but a value of type str"),
        ("doc.of.x", r":1: no text under the key 'doc.of.x' but a number"),
        ("dog.text", r":1: .*'dog.text'; its keys are \['doc'\]"),
    ):
        with pytest.raises(DataError, match=problem):
            list(documents(jsonl(path, field=field)))
    path.write_text('{"doc": null}')
    with pytest.raises(DataError, match=r":1: no text under the key 'doc.text' but null"):
        list(documents(jsonl(path, field="doc.text")))


@pytest.mark.parametrize("kind", ["jsonl", "array", "datasets"])
def test_null_texts_are_refused_or_skipped_and_counted(
    tmp_path: Path, table_cache: None, kind: str
) -> None:
    rows = [{"of": {"text": text}} for text in ("one", None, " ", "", "two")]
    rows.insert(2, {"of": None})
    path = tmp_path / "a.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if kind == "array" else lines)
    source = jsonl(path, field="of.text")
    if kind == "datasets":
        source = table("json", data_files=[str(path)], field="of.text")
    with pytest.raises(DataError, match=r"(:2|element 1|row 1): no text .*'of.text' but null$"):
        list(documents(source))
    skipping = source.model_copy(update={"on_bad_rows": "skip"})
    skipped: list[None] = []
    count = partial(skipped.append, None)
    assert list(documents(skipping, skipped=count)) == ["one", "two"] and len(skipped) == 4
    assert list(documents(skipping.model_copy(update={"documents": 2}))) == ["one", "two"]
    path.write_text('{"of": {"text": 5}}\n')
    with pytest.raises(DataError, match=r"no text .*'of.text' but a "):
        list(documents(skipping))


def test_content_hash_is_of_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a.txt").write_text("some text\n")
    before = content_hash(text(one))
    assert content_hash(text(two)) == before
    (one / "a.txt").write_text("some tent\n")
    assert content_hash(text(one)) != before
    (two / "b.txt").write_text("")
    assert content_hash(text(two)) != before


def table(path: object, **more: object) -> HubSource:
    return HubSource(kind="datasets", path=str(path), **more)


@pytest.mark.parametrize("streaming", [False, True])
def test_builder_of_datasets(tmp_path: Path, table_cache: None, streaming: bool) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,body\n1,first\n2,second\n3,third\n")
    source = table("csv", data_files=[str(path)], field="body", streaming=streaming, documents=2)
    assert list(documents(source)) == ["first", "second"]
    before = content_hash(source)
    path.write_text("id,body\n1,first\n2,second\n3,fourth\n")
    assert before is not None and content_hash(source) != before


@pytest.mark.parametrize("streaming", [False, True])
def test_nested_columns_of_a_table(tmp_path: Path, table_cache: None, streaming: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"n": {n}, "doc": {{"text": "t{n}"}}}}\n' for n in range(250)))
    about = {"data_files": [str(path)], "streaming": streaming}
    assert list(documents(table("json", field="doc.text", **about))) == [
        f"t{n}" for n in range(250)
    ]
    with pytest.raises(DataError, match=r"no column 'dog.text'|row 0: no column 'dog.text'"):
        list(documents(table("json", field="dog.text", **about)))
    with pytest.raises(DataError, match=r"row 0: no value under the key 'doc.body'; the keys of"):
        list(documents(table("json", field="doc.body", **about)))


def test_saved_dataset(tmp_path: Path, table_cache: None) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a b", "c d"], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "dict")
    assert list(documents(table(tmp_path / "one"))) == ["a b", "c d"]
    assert list(documents(table(tmp_path / "dict", split="dev"))) == ["a b", "c d"]
    assert content_hash(table(tmp_path / "one")) is not None
    with pytest.raises(ConfigError, match=r"no split 'train'; it has \['dev'\]"):
        list(documents(table(tmp_path / "dict")))
    with pytest.raises(DataError, match=r"no column 'body'; its columns are \['n', 'text'\]"):
        list(documents(table(tmp_path / "one", field="body")))
    with pytest.raises(DataError, match="row 0: no text in column 'n'"):
        list(documents(table(tmp_path / "one", field="n")))


def test_unknown_dataset(tmp_path: Path, table_cache: None) -> None:
    with pytest.raises(ConfigError, match=r"datasets: no/such-thing: cannot load it"):
        list(documents(table("no/such-thing")))
    assert content_hash(table("no/such-thing")) is None  # only reading tells
