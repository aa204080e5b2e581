"""YAML scalars, duplicate keys, overrides and merging."""

import math

import pytest
import yaml

from dskd.errors import ConfigError
from dskd.settings import yaml_tree


def _load(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return yaml_tree.load(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("-3E6", -3e6), ("+1.5e+2", 150.0), (".5", 0.5), ("2.", 2.0),
        ("125_000", 125000), ("-7", -7), ("0", 0), ("true", True), ("False", False), ("null", None),
        ("~", None), ("", None), ("yes", "yes"), ("off", "off"), ("no", "no"), ("010", "010"),
        ("1:30", "1:30"), ("2026-01-31", "2026-01-31"), ("0x10", "0x10"), ("1e", "1e"),
        ("e5", "e5"), (".", "."), ("'1e-4'", "1e-4"), ("run:teacher", "run:teacher"),
    ],
)  # fmt: skip
def test_scalars(tmp_path, text, value):
    loaded = _load(tmp_path, f"a: {text}\n")["a"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_infinities(tmp_path):
    assert _load(tmp_path, "a: -.inf")["a"] == -math.inf
    assert math.isnan(_load(tmp_path, "a: .nan")["a"])


def test_keys_are_text_and_anchors_work(tmp_path):
    text = "x: &x {1: a, true: b}\ny: {<<: *x, 1: c}\n"
    assert _load(tmp_path, text) == {"x": {"1": "a", "true": "b"}, "y": {"1": "c", "true": "b"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", r"a\.yaml:2:11: not readable as YAML: 'c' is given twice"),
        ("a: [1\n", r"a\.yaml:2:1: not readable as YAML: expected ',' or '\]'"),
        ("? [a]\n: 1\n", r"a\.yaml:1:3: not readable as YAML: a key is not text"),
        ("a: !!python/none\n", r"a\.yaml:1:4: not readable as YAML: the tag tag:yaml"),
        ("a: 1\n---\nb: 1\n", r"a\.yaml:2:1: not readable as YAML: but found another document"),
        ("a: \x01\n", r"a\.yaml: not readable as YAML: .*special characters"),
    ],
)
def test_unreadable_yaml_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        yaml_tree.load(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(byte 6\)"):
        yaml_tree.load(path)
    assert _load(tmp_path, "# nothing\n") == {}


NASTY = {
    "words": ["yes", "no", "1e-4", "010", "1:30", "2026-01-31", "null", "", "~", "true"],
    "more": ["0x10", "1_0"],
    "numbers": [1e-6, 1e-4, 3.0, 125000, -0.0, 1e22],
    "nothing": None,
    "truth": [True, False],
    "text": "a: b # c\n'd' \u00e9",
    "empty": {"a": {}, "b": []},
}


def test_dump_round_trips(tmp_path):
    text = yaml_tree.dump(NASTY)
    assert text.isascii()
    assert _load(tmp_path, text) == NASTY
    assert list(_load(tmp_path, text)) == list(NASTY)
    assert yaml.safe_load(text) == NASTY  # other readers get the same


def test_overrides_make_a_tree():
    words = ["a.b=1e-4", "a.c=[1, x]", "d=", "a.b=2", "e={f: {g: true}}", "h=x=y"]
    expected = {"a": {"b": 2, "c": [1, "x"]}, "d": None, "e": {"f": {"g": True}}, "h": "x=y"}
    assert yaml_tree.overlay(words) == expected


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1"])
def test_a_malformed_override_is_refused(text):
    with pytest.raises(ConfigError, match=r"command line: '.*' is not of the form a\.b=value"):
        yaml_tree.overlay([text])
    with pytest.raises(ConfigError, match=r"command line: a\.b:1:3: not readable as YAML"):
        yaml_tree.overlay(["a.b=[1"])


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"kind": "x", "b": 1}}, {"a": {"kind": "y", "c": 2}}, {"a": {"kind": "y", "c": 2}}),
        (
            {"a": {"kind": "x", "b": 1}},
            {"a": {"kind": "x", "c": 2}},
            {"a": {"kind": "x", "b": 1, "c": 2}},
        ),
        ({"model_type": "bert", "a": 1}, {"model_type": "gpt2"}, {"model_type": "gpt2"}),
        ({"a": [{"b": 1, "c": 2}, 5]}, {"a": {"0": {"c": 3}}}, {"a": [{"b": 1, "c": 3}, 5]}),
        ({"a": [1]}, {"a": {}}, {"a": {}}),
    ],
)
def test_merge(base, over, merged):
    before = str(base), str(over)
    assert yaml_tree.merge(base, over) == merged
    assert (str(base), str(over)) == before


def test_merging_into_an_entry_that_is_not_there():
    with pytest.raises(ConfigError, match=r"a\.b\.2: no such entry; a\.b has 1"):
        yaml_tree.merge({"a": {"b": [1]}}, {"a": {"b": {"2": 0}}})


_BOMB = "a: [&a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]" + "".join(
    f", &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        (f"a: {'9' * 4301}", ":1:4", "a number of 4,301 characters"),
        (f"a: 0.{'9' * 4301}", ":1:4", "a number of 4,303 characters"),
        ("a: &a [*a]", ":1:8", "*a stands for what it is part of"),
        ("a: &a {b: [*a]}", ":1:12", "*a stands for what it is part of"),
        (f"a: {'[' * 1000}", ":1:52", "more than 50 levels"),
        (f"a: {'{b: ' * 1000}", "", "more than 50 levels"),
        (f"{_BOMB}]", "", "more than 100,000 values"),
        ("a: !!bool maybe", ":1:4", "the tag tag:yaml.org,2002:bool says a type"),
        ("a: !!int x", ":1:4", "the tag tag:yaml.org,2002:int says a type"),
        ("a: !!float x", ":1:4", "the tag tag:yaml.org,2002:float says a type"),
        ("a: !!timestamp x", ":1:4", "the tag tag:yaml.org,2002:timestamp says a type"),
        ("a: !mine [x]", ":1:4", "the tag !mine says a type"),
        ('a: "\\ud800"', ":1:4", "a lone surrogate"),
        ('a: {"b\\0c": 1}', ":1:5", "a NUL character"),
        ("#" * 1_000_001, "", "more than 1,000,000 characters are no settings"),
    ],
    ids=lambda value: value[:20],
)
def test_unreasonable_yaml_is_refused_at_once(tmp_path, text, place, problem):
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, f"{text}\n")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.yaml'}{place}") and problem in message
    assert len(message) < 300 + len(str(tmp_path))


def test_long_lists_and_aliases_of_reason_are_read(tmp_path):
    text = f"a: &a [{', '.join(['1'] * 1000)}]\nb: [*a, *a]\nc: {'7' * 100}\nd: '{'7' * 5000}'\n"
    tree = _load(tmp_path, text)
    assert tree["b"] == [[1] * 1000] * 2 and tree["c"] == int("7" * 100) and len(tree["d"]) == 5000


def test_an_override_of_endless_depth_is_refused():
    with pytest.raises(ConfigError, match="has more than 50 levels"):
        yaml_tree.overlay([".".join(["a"] * 1000) + "=1"])
