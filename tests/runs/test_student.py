"""A student as a checkpoint holds it."""

import re
from typing import Any

import pytest

from dskd.engine.checkpoints import Saved
from dskd.engine.hooks import HookChain, StepHooks
from dskd.errors import CheckpointError
from dskd.runs.student import restore_hooks


class Counting(StepHooks):
    """Hooks with a state."""

    def restore(self, state: dict[str, Any]) -> None:
        self.counts = {int(name): step + 0 for name, step in state["counts"].items()}


ODD = [{}, {"a": 3}, {"a": None}, {"a": {}}, {"a": {"counts": [1]}}, {"a": {"counts": {"x": 1}}}]
ODD += [{"a": {"counts": {"1": "x"}}}]


@pytest.mark.parametrize("state", ODD, ids=repr)
def test_a_state_that_hooks_do_not_keep_is_named(tmp_path, state):
    hooks = HookChain({"a": Counting()})
    about = {"step": 1, "world": 1, "stage": 2, "precision": "fp32", "score": None}
    restore_hooks(hooks, Saved(tmp_path, **about, state={"hooks": {"a": {"counts": {"1": 2}}}}))
    where = re.escape(f"{tmp_path}/manifest.json: its `state` is not one")
    with pytest.raises(CheckpointError, match=where):
        restore_hooks(hooks, Saved(tmp_path, **about, state={"hooks": state}))
