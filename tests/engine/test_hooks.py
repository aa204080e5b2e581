"""Several hooks as one: order, state by name, files, what is exported."""

from pathlib import Path
from typing import Any

import pytest

from dskd.engine.hooks import HookChain, StepHooks


class Recorded(StepHooks):
    """Writes down what is called, and answers by what it was made with."""

    def __init__(self, name: str, calls: list[str], *, waits: bool = False) -> None:
        self.name, self.calls, self.waiting = name, calls, waits
        self.restored: Any = None

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*groups, {"params": [], "after": len(groups), "by": self.name}]

    def begin(self, position: int) -> None:
        self.calls.append(f"{self.name} begins at {position}")

    def waits(self, position: int) -> bool:
        return self.waiting and position == 3

    def prepare(self, position: int, step: int, stop: Any) -> None:
        self.calls.append(f"{self.name} prepares {position} at {step}")
        self.waiting = False

    def before_passes(self, probe: Any, step: int) -> None:
        self.calls.append(f"{self.name} before passes")

    def before_micro_batch(self, last: bool) -> None:
        self.calls.append(f"{self.name} micro {last}")

    def before_step(self, weights: Any, step: int, lr: float) -> None:
        self.calls.append(f"{self.name} before {weights} {step} {lr}")

    def after_step(self, weights: Any, step: int, lr: float) -> None:
        self.calls.append(f"{self.name} after {weights} {step} {lr}")

    def complete(self, step: int) -> bool:
        return step >= len(self.name)

    def rates(self) -> dict[str, float]:
        return {f"rate of {self.name}": 1.0}

    def state(self) -> dict[str, Any]:
        return {"of": self.name}

    def restore(self, state: dict[str, Any]) -> None:
        self.restored = state

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "file").write_text(self.name)

    def load(self, folder: Path) -> None:
        self.calls.append(f"{self.name} loads {(folder / 'file').read_text()}")


class Exporting(Recorded):
    defines_export = True

    def exported(self, weights: Any, batch: Any) -> Any:
        return f"{self.name} exports {weights} tried on {batch}"


def chain_of(*hooks: Recorded) -> HookChain:
    return HookChain({each.name: each for each in hooks})


def test_each_is_called_in_order():
    calls: list[str] = []
    chain = chain_of(Recorded("b", calls), Recorded("a", calls))
    chain.begin(7)
    chain.before_passes(None, 2)
    chain.before_micro_batch(last=True)
    chain.before_step("w", 2, 0.5)
    chain.after_step("w", 2, 0.5)
    one = ["begins at 7", "before passes", "micro True", "before w 2 0.5", "after w 2 0.5"]
    assert calls == [f"{name} {call}" for call in one for name in ("b", "a")]
    groups = chain.groups([{"params": [1]}])
    assert [(g.get("by"), g.get("after")) for g in groups] == [(None, None), ("b", 1), ("a", 2)]
    assert chain.rates() == {"rate of b": 1.0, "rate of a": 1.0}


def test_only_those_that_wait_prepare():
    calls: list[str] = []
    chain = chain_of(*(Recorded(name, calls, waits=name != "b") for name in "abc"))
    assert not chain.waits(2) and chain.waits(3)
    chain.prepare(3, 5, lambda: False)
    assert calls == ["a prepares 3 at 5", "c prepares 3 at 5"]
    assert not chain.waits(3)


def test_any_of_them_ends_the_training():
    class Ends(StepHooks):
        limit = 3.0

        def evaluated(self, score: float) -> None:
            self.limit = score

        def over(self) -> bool:
            return self.limit < 1.0

    chain = HookChain({"a": StepHooks(), "b": Ends()})
    assert not chain.over()
    chain.evaluated(0.5)
    assert chain.over()


def test_a_student_is_complete_once_it_is_to_all():
    chain = chain_of(Recorded("two", []), Recorded("four.", []))
    assert [chain.complete(step) for step in (2, 3, 4, 5)] == [False, False, False, True]


def test_state_and_files_are_kept_by_name(tmp_path):
    calls: list[str] = []
    before = chain_of(Recorded("method", calls), Recorded("data", calls))
    state = before.state()
    assert state == {"method": {"of": "method"}, "data": {"of": "data"}}
    before.save(tmp_path)
    only = Recorded("method", calls)  # as an export has them
    after = chain_of(only)
    after.restore(state)
    after.load(tmp_path)
    assert only.restored == {"of": "method"}
    assert calls == ["method loads method"]


def test_no_hooks_do_nothing(tmp_path):
    chain = HookChain({})
    groups = [{"params": []}]
    assert chain.groups(groups) is groups
    assert not chain.waits(0) and chain.complete(0) and not chain.defines_export
    assert not chain.touches_weights and not HookChain({"idle": StepHooks()}).touches_weights
    assert chain_of(Recorded("a", [])).touches_weights
    assert chain.state() == chain.rates() == {}
    chain.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_at_most_one_defines_the_export():
    chain = chain_of(Recorded("a", []), Exporting("b", []))
    assert chain.defines_export
    assert chain.exported("w", "rows") == "b exports w tried on rows"
    with pytest.raises(AssertionError, match=r"several .*\['b', 'c'\]"):
        chain_of(Exporting("b", []), Exporting("c", []))


def test_two_rates_of_one_name_are_a_mistake():
    hooks = Recorded("a", [])
    with pytest.raises(AssertionError, match="rate of a"):
        HookChain({"one": hooks, "two": hooks}).rates()
