"""The device shows the mistakes that a GPU would: one planted fault a test."""

import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest

from dskd.batch import Batch
from dskd.errors import NonFiniteError
from dskd.methods import inheritance_loss
from dskd.settings.yaml_tree import dump, merge
from dskd.stores.logits import LogitLayout
from dskd.system import dist
from tests.equivalence.small import Runs, settings
from tests.launching import forked
from tests.shadow.cases import CASES, plain_losses, train
from tests.shadow.watched import read, watched


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"))


def plant(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], old: str, new: str) -> str:
    """Change a piece of a function's text, wherever it is used; ``file:line`` of the piece."""
    lines, first = inspect.getsourcelines(function)
    source = "".join(lines)
    assert source.count(old) == 1, source
    text = "\n" * (first - 1) + textwrap.dedent(source).replace(old, new)
    module = compile(text, function.__code__.co_filename, "exec", dont_inherit=True)
    (code,) = [c for c in module.co_consts if isinstance(c, CodeType)]
    assert code.co_freevars == function.__code__.co_freevars
    monkeypatch.setattr(function, "__code__", code)
    line = first + source[: source.index(old)].count("\n")
    return f"{inspect.getmodule(function).__name__.replace('.', '/')}.py:{line}"


def failed(runs: Runs, case: str) -> str:
    """What the run of a case dies of, of one rank: of two, the other may end first."""
    with plain_losses(), pytest.raises(AssertionError) as problem:
        train(runs, f"failed {case}", case, 1, "bf16")
    return str(problem.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("else copy(column)", "else column", "ids: is on cpu, not the logits'"),
        ("copy(self.positions_N)", "self.positions_N", "Expected all tensors to be on the same"),
    ],
)
def test_a_part_of_a_batch_that_stays_on_the_cpu(runs, monkeypatch, old, new, message):
    plant(monkeypatch, Batch._copied, old, new)
    assert message in failed(runs, "ki cached")


def test_what_fails_on_one_rank_is_told_by_status_2_on_all(runs, monkeypatch, capfd):
    """Said once; the other rank learns of it where the two meet next, as on a CPU."""
    encode = LogitLayout.encode

    def fails_on_rank_1(layout: LogitLayout, *args: Any) -> Any:
        if dist.rank() == 1:
            raise NonFiniteError("planted on rank 1")
        return encode(layout, *args)

    monkeypatch.setattr(LogitLayout, "encode", fails_on_rank_1)
    recipe = runs.folder / "one rank.yaml"
    recipe.write_text(dump(merge(settings(runs.folder), CASES["ki cached"])), encoding="utf-8")
    words = (str(recipe), f"out={runs.folder / 'one rank'}", "deepspeed=zero2")
    forked(2, *words, status=2)
    assert capfd.readouterr().err.count("error: planted on rank 1\n") == 1


def test_a_wait_in_a_loss(runs, monkeypatch):
    """Named with its line, for each micro-batch."""
    place = plant(
        monkeypatch,
        inheritance_loss.labels_term,
        "losses.total,",
        "losses.total * losses.total.item() ** 0,",
    )
    file = runs.folder / "waits.json"
    with plain_losses(), watched(file):
        train(runs, "waits", "lm", 2, "bf16")
    assert read(file).own("passes") == {f"{place} (item)": 4}
