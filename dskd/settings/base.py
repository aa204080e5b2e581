"""The base of all settings, and what can be declared at one of their fields besides its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Freedom:
    """Until when a setting may change between two calls that carry out one run.

    ``always``: it says where, how fast or how far, but not what comes out. ``chosen``: until
    something is made that depends on which of the scored tokens are chosen. ``taken``: as far as
    steps are still to come; the change is written down (``runs/changes.py``). A setting without
    one is settled by the first call.
    """

    until: Literal["always", "chosen", "taken"]


FREE = Freedom("always")
OF_STEPS_TO_COME = Freedom("taken")
CHOSEN_LATER = Freedom("chosen")


@dataclass(frozen=True)
class RunPath:
    """Says that a setting is a path, in which ``~/`` is the user's home.

    ``output``: what ``run:NAME`` stands for in it: what that earlier run of the recipe leaves; None
    if it may not be written.
    """

    output: Literal["export", "cache", "store", "distilled"] | None = None


class Section(BaseModel):
    """Base of every group of settings: unknown keys are refused, values are never changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def freedom(self, name: str) -> Freedom | None:
        """Until when the field ``name`` may change, given the values of the others."""
        metadata = type(self).model_fields[name].metadata
        return next((mark for mark in metadata if isinstance(mark, Freedom)), None)
