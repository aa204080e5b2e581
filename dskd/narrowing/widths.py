"""The sizes a student may have, and what each group of units has to lose to reach them.

Weight-Inherited Distillation keeps the layers and narrows them. Units are removed in groups: ``R``
the residual stream, ``T`` the head transform of masked LMs, ``A`` a layer's attention, ``F`` a
layer's feed-forward part. What can be reached depends on where the heads are:

* not rotary (BERT, RoBERTa, GPT-2): attention is as wide as the residual stream, so a strategy
  fixes the heads. ``dim`` keeps their number and narrows each; ``head`` removes whole heads.
* rotary (Llama, Qwen): positions forbid a narrower head, so both strategies remove whole kv-groups
  (a key-value head with the query heads that read it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dskd.errors import ConfigError

Strategy = Literal["dim", "head"]
RuleName = Literal["annealed", "original"]
Pace = Literal["sixteenths", "eighths", "heads"]
"""How fast the original rule removes a group's units, see ``units.original_count``."""

_STEPS_OF_A_CHUNK = 8


@dataclass(frozen=True)
class Widths:
    """Sizes of a transformer's layers.

    Attributes:
        hidden: width of the residual stream.
        intermediate: units of a feed-forward part.
        heads: query heads of a layer.
        kv_heads: key-value heads, a divisor of ``heads``.
        head_dim: entries of a head.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Family:
    """What a model family demands of its widths.

    Attributes:
        rotary: heads keep their ``head_dim``, and attention need not be as wide as ``hidden``.
        divides: ``hidden`` must be a multiple of ``heads`` (Llama's own configuration checks it).
    """

    rotary: bool = False
    divides: bool = False


@dataclass(frozen=True)
class Target:
    """The sizes that the settings of these names want; None: in proportion to ``hidden_size``."""

    hidden_size: int
    intermediate_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    strategy: Strategy = "dim"
    rule: RuleName = "annealed"
    section: str = "method"
    """Dotted name of that section, for messages."""


@dataclass(frozen=True)
class Cut:
    """What a group of units loses.

    Attributes:
        size: units before.
        remove: units to remove in the end.
        chunks: so many equal runs of consecutive units, each of which loses the same number.
        pace: how fast the original rule goes.
    """

    size: int
    remove: int
    chunks: int = 1
    pace: Pace = "sixteenths"


def student_widths(teacher: Widths, target: Target, family: Family) -> Widths:
    """The sizes of the student, checked against what its family, strategy and rule allow.

    Raises:
        ConfigError: they cannot be reached; names the setting and the nearest values that can.
    """
    hidden = target.hidden_size
    problem = _hidden_problem(teacher, target, family, hidden)
    if problem is not None:
        sizes = range(1, teacher.hidden + 1)
        possible = [n for n in sizes if _hidden_problem(teacher, target, family, n) is None]
        raise _impossible(target, "hidden_size", hidden, problem, possible)
    asked = target.intermediate_size
    intermediate = _share(teacher.intermediate, hidden, teacher.hidden) if asked is None else asked
    if not 1 <= intermediate <= teacher.intermediate:
        text = f"is not within the teacher's {teacher.intermediate}"
        sizes = range(1, teacher.intermediate + 1)
        raise _impossible(target, "intermediate_size", intermediate, text, sizes)
    if family.rotary:
        kv_heads = _kv_heads(teacher, target, hidden)
        heads = kv_heads * (teacher.heads // teacher.kv_heads)
        return Widths(hidden, intermediate, heads, kv_heads, teacher.head_dim)
    heads = teacher.heads if target.strategy == "dim" else hidden // teacher.head_dim
    for name, wanted in (("heads", target.heads), ("kv_heads", target.kv_heads)):
        if wanted not in {None, heads}:
            text = f"does not go with strategy {target.strategy} and hidden_size {hidden}"
            raise _impossible(target, name, wanted, text, (heads,))
    return Widths(hidden, intermediate, heads, heads, hidden // heads)


def cuts(
    teacher: Widths, student: Widths, strategy: Strategy, rule: RuleName, family: Family
) -> dict[str, Cut]:
    """What each kind of group loses, by its letter: ``R``, ``T``, ``A`` and ``F``.

    The original code's rule cuts the residual stream like attention, in as many chunks as there are
    heads, though it has none; the default one ranks its entries as a whole.
    """
    width, gone, heads = teacher.hidden, teacher.hidden - student.hidden, teacher.heads
    stream = Cut(width, gone)
    if rule == "original" and strategy == "dim":
        stream = Cut(width, gone, heads, "eighths")
    elif rule == "original":
        stream = Cut(heads, gone // (width // heads), pace="heads")
    if family.rotary:
        attention = Cut(teacher.kv_heads, teacher.kv_heads - student.kv_heads, pace="heads")
    elif strategy == "dim":
        lost = heads * (teacher.head_dim - student.head_dim)
        attention = Cut(heads * teacher.head_dim, lost, heads, "eighths")
    else:
        attention = Cut(heads, heads - student.heads, pace="heads")
    feed_forward = Cut(teacher.intermediate, teacher.intermediate - student.intermediate)
    return {"R": stream, "T": Cut(width, gone), "A": attention, "F": feed_forward}


def _hidden_problem(teacher: Widths, target: Target, family: Family, hidden: int) -> str | None:
    """What forbids a student of this hidden size, if anything."""
    gone = teacher.hidden - hidden
    if hidden < 1 or gone < 0:
        return f"is not within the teacher's {teacher.hidden}"
    if not family.rotary:
        kept = teacher.heads if target.strategy == "dim" else teacher.head_dim
        what = "heads" if target.strategy == "dim" else "entries of a head"
        if hidden % kept:
            return f"is not a multiple of the {kept} {what} that strategy {target.strategy} keeps"
    elif family.divides:
        heads = _kv_heads(teacher, target, hidden) * (teacher.heads // teacher.kv_heads)
        if hidden % heads:
            return f"is not a multiple of its {heads} heads"
    if target.rule == "original":
        return _original_problem(teacher, target.strategy, gone)
    return None


def _original_problem(teacher: Widths, strategy: Strategy, gone: int) -> str | None:
    """What forbids the original rule to remove ``gone`` entries of the residual stream."""
    if teacher.hidden % teacher.heads:
        return f"needs rule annealed: the teacher's {teacher.hidden} has no {teacher.heads} chunks"
    chunk = teacher.hidden // teacher.heads
    if strategy == "head":
        return f"does not remove whole chunks of {chunk} (rule original)" if gone % chunk else None
    per_chunk, rest = divmod(gone, teacher.heads)
    if rest:
        return f"does not remove as many of each of {teacher.heads} chunks (rule original)"
    if 0 < per_chunk < _STEPS_OF_A_CHUNK:
        return (
            f"removes {per_chunk} of each of {teacher.heads} chunks;"
            f" rule original removes at least {_STEPS_OF_A_CHUNK}"
        )
    return None


def _kv_heads(teacher: Widths, target: Target, hidden: int) -> int:
    """Key-value heads of a rotary student, of the settings or in proportion to ``hidden``."""
    queries = teacher.heads // teacher.kv_heads
    counts = range(1, teacher.kv_heads + 1)
    if target.heads is not None and target.heads not in {queries * n for n in counts}:
        text = f"is not 1 to {teacher.kv_heads} times the {queries} query heads of a kv-group"
        raise _impossible(target, "heads", target.heads, text, [queries * n for n in counts])
    if target.kv_heads is not None and target.kv_heads not in counts:
        text = f"is not within the teacher's {teacher.kv_heads}"
        raise _impossible(target, "kv_heads", target.kv_heads, text, counts)
    if target.heads is None:
        share = _share(teacher.kv_heads, hidden, teacher.hidden)
        return share if target.kv_heads is None else target.kv_heads
    kv_heads = target.heads // queries
    if target.kv_heads not in {None, kv_heads}:
        text = f"does not go with heads {target.heads}"
        raise _impossible(target, "kv_heads", target.kv_heads, text, (kv_heads,))
    return kv_heads


def _share(size: int, part: int, whole: int) -> int:
    """``size * part / whole``, rounded to the nearest whole number, halves up; at least 1."""
    return max(1, (2 * size * part + whole) // (2 * whole))


def _impossible(
    target: Target, name: str, value: int, text: str, possible: Sequence[int]
) -> ConfigError:
    below = [n for n in possible if n < value][-1:]
    above = [n for n in possible if n > value][:1]
    near = " or ".join(str(n) for n in below + above)
    setting = f"{target.section}.{name}"
    return ConfigError(f"{setting}: {value} {text}; nearest possible: {near or 'none'}")
