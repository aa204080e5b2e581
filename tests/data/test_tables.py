"""Tables of `datasets`: what of a saved folder is read, and damage named by file and line."""

import json
from pathlib import Path

import datasets
import pytest

from dskd.data.sources import content_hash, documents
from dskd.errors import ConfigError, DskdError
from dskd.settings.data import HubSource
from tests.data.conftest import without_rights

GOOD = '{"text": "a b"}\n'
LONG = '{"text": "' + "a b " * 25_000 + '"}\n'


@pytest.fixture(autouse=True)
def table_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def read(path: object, **more: object) -> list[str]:
    source = HubSource(kind="datasets", path=str(path), **more)
    content_hash(source)  # as before any building
    return list(documents(source))


def rows(count: int = 20) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(count)]})


def one(folder: Path, table: datasets.Dataset | None = None) -> Path:
    """A saved table of twenty rows."""
    (table or rows()).save_to_disk(folder / "one")
    return folder / "one"


def both(folder: Path) -> Path:
    """A saved table of twenty rows and one of three."""
    datasets.DatasetDict({"train": rows(), "dev": rows(3)}).save_to_disk(folder / "both")
    return folder / "both"


@pytest.mark.parametrize(
    ("split", "want"),
    [
        ("train[:10%]", [0, 1]),
        ("train[-2:]", [18, 19]),
        ("train[3:5]+train[50%:55%]", [3, 4, 10]),
        ("train", range(20)),
    ],
)
def test_slices_of_a_saved_folder(tmp_path: Path, split: str, want: list[int]) -> None:
    assert read(one(tmp_path), split=split) == [f"t{i}" for i in want]
    assert read(both(tmp_path), split=split) == [f"t{i}" for i in want]


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    assert read(both(tmp_path), split="dev[1:]+train[:1]") == ["t1", "t2", "t0"]
    held = one(tmp_path / "held", datasets.Dataset.from_dict({"text": ["x"]}, split="test"))
    assert read(held, split="test") == ["x"]
    with pytest.raises(ConfigError, match=r"no split 'train'; it has \['test'\]"):
        read(held)


@pytest.mark.parametrize("split", ["dev", "train[", "train[:200%]", "", "train+dev", "train[x:]"])
def test_a_split_that_a_saved_folder_has_not_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(one(tmp_path), split=split)
    assert f"one: no split {split!r}; it has ['train']" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "option"),
    [
        *[("saved", name) for name in ("config", "revision", "data_files", "streaming")],
        *[("csv", name) for name in ("config", "revision")],
        ("plain", "revision"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, path: str, option: str) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.csv").write_text("text\nx\n")
    value = {"data_files": [str(tmp_path / "plain" / "a.csv")], "streaming": True}.get(option, "x")
    given = {option: value}
    if path == "csv":
        given["data_files"] = [str(tmp_path / "plain" / "a.csv")]
    where = {"saved": one(tmp_path), "plain": tmp_path / "plain"}.get(path, path)
    with pytest.raises(ConfigError, match=f"{option}: has no effect here"):
        read(where, **given)


def test_files_behind_links_are_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` follows links that are named, and leaves out those it would have to find."""
    for place in ("plain/sub", "far/in"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.csv").write_text(f"text\n{place}\n")
    (tmp_path / "plain" / "link").symlink_to(tmp_path / "far")
    monkeypatch.chdir(tmp_path)
    for path, files in (
        ("plain", None),
        ("plain", ["**/*.csv"]),
        ("csv", ["plain/**/*.csv"]),
        ("csv", [str(tmp_path / "plain" / "*" / "in" / "*.csv")]),
    ):
        with pytest.raises(DskdError, match=r"plain/link: datasets does not follow"):
            read(path, data_files=files)
    assert read("csv", data_files=["plain/link/in/a.csv"]) == ["far/in"]
    assert read("csv", data_files=["plain/link/in/*.csv", "plain/s*/*.csv"]) == [
        "far/in",
        "plain/sub",
    ]
    assert read("plain", data_files=["link/in/*.csv"]) == ["far/in"]


def test_a_folder_that_data_files_cannot_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "plain" / "shut").mkdir(parents=True)
    (tmp_path / "plain" / "a.csv").write_text("text\nx\n")
    (tmp_path / "plain" / "shut").chmod(0)
    source = HubSource(kind="datasets", path="csv", data_files=["plain/**/*.csv"])
    with without_rights(), pytest.raises(DskdError, match="plain/shut: cannot be read"):
        content_hash(source)


BROKEN = ["{}", "[]", "", "{", "null", "3", "[" * 50_000, '{"splits": 3, "_data_files": [3]}']


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize(
    "name", ["one/state.json", "both/dataset_dict.json", "both/dev/state.json"]
)
def test_damaged_file_of_a_saved_folder_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = (one if name.startswith("one") else both)(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DskdError, match=name):
        read(folder)


@pytest.mark.parametrize("content", [*BROKEN[1:-1], '{"features": {"text": 3}}'])
def test_damaged_description_of_a_saved_folder(tmp_path: Path, content: str) -> None:
    (one(tmp_path) / "dataset_info.json").write_text(content)
    with pytest.raises(DskdError, match="one: cannot load it"):
        read(tmp_path / "one")


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_damaged_rows_of_a_saved_folder(tmp_path: Path, damage: str) -> None:
    (path,) = one(tmp_path).glob("*.arrow")
    whole = path.read_bytes()
    path.write_bytes(whole[:100] if damage == "cut" else b"")
    if damage == "gone":
        path.unlink()
    with pytest.raises(DskdError, match=str(tmp_path / "one")):
        read(tmp_path / "one")


def test_a_saved_folder_names_no_files_outside(tmp_path: Path) -> None:
    state = one(tmp_path) / "state.json"
    (path,) = one(tmp_path / "far").glob("*.arrow")
    content = json.loads(state.read_text())
    for outside in (str(path), f"../far/one/{path.name}"):
        content["_data_files"] = [{"filename": outside}]
        state.write_text(json.dumps(content))
        with pytest.raises(DskdError, match=r"state\.json: names .*, which is not inside"):
            read(tmp_path / "one")
    (both(tmp_path) / "dataset_dict.json").write_text('{"splits": ["../far/one"]}')
    with pytest.raises(DskdError, match=r"dataset_dict\.json: names '../far/one', which is not in"):
        read(tmp_path / "both")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("builder", "content", "problem"),
    [
        ("json", GOOD * 3 + "{broken\n" + GOOD, r"bad:4: not JSON"),
        ("json", LONG * 130 + '{"text": \n', r"bad:131: not JSON"),  # beyond a chunk
        (
            "json",
            GOOD + '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n",
            r"bad:2: nested too deep",
        ),
        ("json", GOOD + '{"text": "a \\ud800"}\n', r"bad:2: not Unicode text"),
        ("json", GOOD.encode() + b'{"text": "na\xefve"}\n', r"bad: not UTF-8 at byte 28 .line 2"),
        ("json", "", r"bad: empty"),
        ("json", "3\n", r"/bad"),
        ("json", GOOD + '{"text": null}\n', r"row 1: no text in column 'text' but null$"),
        ("json", GOOD + '{"text": ["a"]}\n', r"row 1: no text in column 'text' but a list$"),
        ("csv", "text,b\nx,y\n1,2,3,4\n", r"/bad' .*Expected 2 fields in line 3, saw 4"),
        ("csv", b"text,b\nx,y\nna\xefve,y\n", r"bad: not UTF-8 at byte 13 .line 3"),
        ("csv", "text,b\nx,y\n,z\n", r"row 1: no text in column 'text' but null$"),
        ("csv", "", r"bad: empty"),
        ("text", b"text\nna\xefve\n", r"bad: not UTF-8 at byte 7 .line 2"),
        ("parquet", b"PAR1junkjunkPAR1", r"/bad"),
        ("arrow", b"junkjunk", r"/bad"),
    ],
)
def test_broken_row_is_named_streamed_or_not(
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    builder: str,
    content: str | bytes,
    problem: str,
    streaming: bool,
) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DskdError, match=f"data.sources: datasets: {builder}: .*{problem}"):
        read(builder, data_files=[str(path)], streaming=streaming)
    assert capfd.readouterr().err == "", "one message, not one of the library beside it"


def test_long_numbers_beside_the_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(GOOD + '{"text": "c", "n": ' + "9" * 5000 + "}\n")
    assert read("json", data_files=[str(tmp_path / "a.json")]) == ["a b", "c"]
