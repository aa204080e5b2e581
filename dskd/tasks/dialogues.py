"""Scores of dialogue state tracking (WOZ; Wen et al. 2017): what a user wants, turn by turn.

An answer says what a turn changes, ``SLOT: VALUE, SLOT: VALUE; SLOT, SLOT``: first what the user
tells, then, behind the one semicolon, what the user asks for. ``None`` says that nothing changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """What one turn changes.

    Attributes:
        told: values by their slots.
        asked: slots in their order; None: the answer says nothing at all.
    """

    told: dict[str, str]
    asked: tuple[str, ...] | None


def turn_of(answer: str) -> Turn:
    """What an answer says; one without exactly one semicolon says nothing.

    A part of the first half that is not ``SLOT: VALUE`` is left out, as in the original.
    """
    halves = answer.split(";")
    if answer.strip() in ("", ";") or len(halves) != 2:
        return Turn({}, None)
    told, asked = ([part.strip() for part in half.split(",")] for half in halves)
    pairs = [part.split(":") for part in told if part.count(":") == 1]
    return Turn({slot.strip(): value.strip() for slot, value in pairs}, tuple(asked))


def dialogue_scores(
    names: Sequence[str], predicted: Sequence[str], wanted: Sequence[str]
) -> dict[str, float]:
    """How many turns are right, in per cent.

    Args:
        names: of the turns; what stands before the last ``_`` is the name of the dialogue. Its
            turns count in the order of the numbers behind that, or, if there are others than
            numbers, as they are given.
        predicted: answers of a model.
        wanted: the right ones.

    Returns:
        ``joint_goal_em``: all that was told in the dialogue up to the turn is right;
        ``turn_request_em``: what is asked for; ``turn_goal_em``: what is told in the turn;
        ``avg_dialogue``: the mean of the first two.
    """
    states: dict[str, tuple[dict[str, str], dict[str, str]]] = defaultdict(lambda: ({}, {}))
    joint = asked = told = 0
    turns = list(zip(names, predicted, wanted, strict=True))
    if all(name.rpartition("_")[2].isdecimal() for name in names):
        turns.sort(key=lambda turn: int(turn[0].rpartition("_")[2]))
    for name, one, other in turns:
        found, right = turn_of(one), turn_of(other)
        state, right_state = states[name.rpartition("_")[0]]
        state.update(found.told)
        right_state.update(right.told)
        joint += state == right_state
        asked += found.asked == right.asked
        told += found.told == right.told
    goal, request, turn = (100 * n / len(names) for n in (joint, asked, told))
    return {
        "joint_goal_em": goal,
        "turn_request_em": request,
        "turn_goal_em": turn,
        "avg_dialogue": (goal + request) / 2,
    }
