"""The text of the Python library: what the corpus takes, and its paragraphs as labelled rows."""

import ast
import inspect
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from dskd.data import library
from dskd.data.examples import examples
from dskd.data.library import MODULES, docstrings
from dskd.data.prepared import open_prepared, prepare
from dskd.data.sources import content_hash, documents, files, size
from dskd.errors import DataError
from dskd.settings.data import BuiltinSource, Data
from dskd.settings.labels import LabelPart

LABELLED = BuiltinSource(label="module")


def test_builtin_is_topics_then_docstrings() -> None:
    import pydoc_data.topics

    found = list(documents(BuiltinSource(documents=300)))
    topics = [t for t in pydoc_data.topics.topics.values() if t.strip()]
    assert found[: len(topics)] == topics
    import __future__ as first_module  # the first file of the library by name

    assert found[len(topics)] == inspect.getdoc(first_module)
    assert len(found) == 300
    assert found == list(documents(BuiltinSource(documents=300)))


def test_builtin_takes_docstrings_of_methods_and_leaves_tests_out() -> None:
    paths = files(BuiltinSource())
    assert len(paths) > 300
    assert not [p for p in paths if {"test", "tests", "site-packages", "idlelib"} & set(p.parts)]
    assert content_hash(BuiltinSource()) == content_hash(BuiltinSource(documents=3))
    source = textwrap.dedent('''
        """Module."""
        class A:
            """Class."""
            def f(self):
                """Method."""
                def g():
                    """Inner."""
    ''')
    assert list(docstrings(ast.parse(source))) == ["Module.", "Class.", "Method.", "Inner."]


def test_labelled_rows_are_paragraphs_that_one_module_has_alone() -> None:
    found = [(example.text, example.label) for example in examples(LABELLED)]
    counts = Counter(module for _, module in found)
    assert sorted(counts) == list(MODULES) == sorted(MODULES) and len(MODULES) == 16
    assert len(found) > 4000 and min(counts.values()) > 100
    texts = [text for text, _ in found]
    assert len(set(texts)) == len(texts)
    names = re.compile(rf"\b({'|'.join(MODULES)})\b", re.IGNORECASE)
    assert not [text for text in texts if names.search(text) or " ".join(text.split()) != text]
    assert any("get_doctest" in text for text in texts)  # an identifier is one word
    import difflib

    second = inspect.getdoc(difflib).split("\n\n")[1]
    assert (" ".join(second.split()), "difflib") in found


def test_the_first_labelled_rows_are_of_all_modules() -> None:
    some = LABELLED.model_copy(update={"documents": 48})
    assert [example.label for example in examples(some)] == 3 * list(MODULES)
    read = []
    list(examples(LABELLED, read.append))
    assert sum(read) == size(LABELLED) < size(BuiltinSource())
    assert {p.parts[-1] for p in files(LABELLED)} > {"_pydecimal.py", "minidom.py", "typing.py"}


def test_what_makes_a_labelled_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = "one two three four five six", "what xml and this module have in common"
    for module in MODULES:
        lines = [f"{module} of a b c d {module}_x {module.upper()}.Y, one", f"  {two[5:]} {module}"]
        content = "\n".join(lines) + f"\n\n{two}.\n\nToo few words here: 7 8 9\n\n{one} {module}x"
        (tmp_path / f"{module}.py").write_text(f'"""{content}\n"""\n')
    monkeypatch.setattr(library, "_root", lambda: tmp_path)
    assert [text for text, module in library.library_rows(int) if module == "http"] == [
        "module of a b c d http_x module.Y, one module and this module have in common module",
        "one two three four five six httpx",
    ]
    (tmp_path / "http.py").unlink()
    with pytest.raises(
        DataError, match=r"^data.sources: builtin: this Python lacks \['http'\], of"
    ):
        list(examples(LABELLED))


def test_labelled_rows_are_prepared_by_parts_of_their_classes(tmp_path: Path) -> None:
    halves = []
    for part in (0, 1):
        data = Data(
            objective="classification",
            sources=[LABELLED.model_copy(update={"documents": 480})],
            labels=LabelPart(part=part, of=2),
            validation_fraction=0.2,
            folder=tmp_path,
        )
        halves.append(open_prepared(prepare(data)))
    assert [c for half in halves for c in half.classes] == list(MODULES)
    assert sum(len(half.train) + len(half.validation) for half in halves) == 480
