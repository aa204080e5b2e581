"""Which runs may be measured against each other: those whose scores are about the same tokens.

A mean loss a token is a number of its vocabulary, of the rows that it was taken on, and of what was
hidden in them. ``train/summary.json`` keeps all of that, so runs can be compared that were made by
other recipes, and folders can be moved.

Bits per byte are a number of the text alone. By them all causal LMs are compared whose validation
rows stand for the same documents, each to its last byte, whatever their tokens and blocks are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dskd.engine.checkpoints import Selection
from dskd.errors import CheckpointError, ConfigError
from dskd.methods.metrics import BY_TEACHERS
from dskd.runs.context import RunContext
from dskd.runs.history import read_history, read_summary
from dskd.runs.report import BY_BYTES, Group
from dskd.settings.folders import RunFolder
from dskd.settings.teachers import PanelTeacher, each_teacher, section_name
from dskd.stores.fingerprints import expected
from dskd.system.files import fingerprint

KEY = "evaluated_on"
"""Where a summary keeps it."""

Basis = Mapping[str, str]
"""What a run's evaluations are of, by the names of ``_WHAT``."""

_WHAT = {
    "objective": "data.objective",
    "vocabulary": "the vocabulary (data.tokenizer)",
    "rows": "the validation rows (data.sources, data.validation, evaluation.rows)",
    "masks": "the masks of the validation rows (data.masking)",
    "target": "what their students are compared with (evaluation.select, method, teacher)",
}
_TARGET = "target"
"""Which a summary lacks where students are compared with tokens or labels."""
_TEXT = "text"
"""The documents that the rows stand for, all of them; a summary has it where that is known."""

BY_BITS = Selection(BY_BYTES)
"""What runs on the same text are compared by whose rows differ."""


def basis(context: RunContext) -> Basis:
    """What the evaluations of a run are of (collective)."""
    data, rows = context.run.data, context.prepared.validation
    limit = context.run.evaluation.rows
    taken = len(rows) if limit is None else min(limit, len(rows))
    found = {
        "objective": data.objective,
        "vocabulary": context.prepared.tokenizer_fingerprint,
        "rows": fingerprint({"rows": rows.content, "taken": taken}),
        "masks": context.validation_view.fingerprint,
    }
    if context.scored == BY_TEACHERS:
        found[_TARGET] = _target(context)
    if rows.text is not None and taken == len(rows):
        found[_TEXT] = rows.text.fingerprint
    return found


def _target(context: RunContext) -> str:
    """Fingerprint of what a method makes of a panel, wherever its models lie and however they are
    sharded (collective)."""
    run, panel = context.run, context.run.teacher
    assert isinstance(panel, PanelTeacher), panel
    teachers = []
    for name, member in each_teacher(panel).items():
        where = section_name(name)
        prints = expected(run, member, context.prepared, context.validation_view, where)
        teachers.append([prints["teacher"], member.labels, member.own_tokenizer, member.domains])
    dropout = None
    if panel.confidence != "logits":
        dropout = [panel.passes if panel.asks_passes else 1, panel.dropout]
    return fingerprint({"method": run.method, "teachers": teachers, "dropout": dropout})


def groups_of(runs: Mapping[str, Path], control: str | None) -> list[Group]:
    """Trained runs, those together whose scores may be compared, in the order of the runs; first
    those of the ``control``, or else of the first run.

    A run that does not say what it was evaluated on (its summary is of an earlier dskd) is alone.
    Behind these come groups of those on the same text that are not all in one: each of them is then
    in two.

    Raises:
        CheckpointError: a summary is missing or damaged, or the metrics of a run on text are.
    """
    first = control if control in runs else next(iter(runs))
    found: list[tuple[Basis | None, list[str]]] = []
    for name in [first, *(name for name in runs if name != first)]:
        own = _read(runs[name])
        same = [names for other, names in found if own is not None and other == own]
        if same:
            same[0].append(name)
        else:
            found.append((own, [name]))
    order = list(runs).index
    groups = [Group(sorted(names, key=order)) for _, names in found]
    for at, group in enumerate(groups[1:], 1):
        why = _why_apart(runs[first], runs[group.names[0]])
        text = f"{', '.join(group.names)}: not to be compared with {first}, {why}"
        groups[at] = Group(group.names, text)
    return [*groups, *_groups_of_texts(runs, groups)]


def _groups_of_texts(runs: Mapping[str, Path], groups: Sequence[Group]) -> list[Group]:
    """Those of the same text that are not all in one of the groups, in the order of the runs."""
    of_text: dict[str, list[str]] = {}
    for name, folder in runs.items():
        if (text := _text(folder)) is not None:
            of_text.setdefault(text, []).append(name)
    return [
        Group(
            names,
            f"{', '.join(names)}: compared by bits per byte, as their validation text is the same",
            BY_BITS,
        )
        for names in of_text.values()
        if not any(set(names) <= set(group.names) for group in groups)
    ]


def refuse_incomparable(runs: Mapping[str, Path]) -> None:
    """Refuse to compare trained runs whose scores are about different things, and which bits per
    byte do not compare either.

    Raises:
        ConfigError: names the first two such runs, and what differs.
        CheckpointError: a summary is missing or damaged.
    """
    first, *others = runs.values()
    for other in others:
        why = _why_apart(first, other)
        texts = _text(first), _text(other)
        if why and (None in texts or texts[0] != texts[1]):
            more = _why_not_by_bits(first, other)
            raise ConfigError(f"report: {first} and {other} cannot be compared, {why}{more}")


def _why_not_by_bits(a: Path, b: Path) -> str:
    """What to add of two runs that cannot be compared by bits per byte; nothing unless both are
    causal LMs."""
    bases = [_read(folder) or {} for folder in (a, b)]
    if any(own.get("objective") != "causal" for own in bases):
        return ""
    lacking = [str(folder) for folder in (a, b) if _text(folder) is None]
    if not lacking:
        return "; nor by bits per byte, since their validation text differs"
    why = "evaluation.rows leaves rows out, or its data stage says why"
    return f"; nor by bits per byte, which {lacking[0]} does not have ({why})"


def _why_apart(a: Path, b: Path) -> str:
    """Why the scores of the trained runs in two folders cannot be compared; empty if they can."""
    basis_a, basis_b = _read(a), _read(b)
    for folder, own in ((a, basis_a), (b, basis_b)):
        if own is None:
            return f"since {RunFolder(folder).summary} does not say what it was evaluated on"
    assert basis_a is not None and basis_b is not None
    found = [name for name in _WHAT if basis_a[name] != basis_b[name]]
    if "vocabulary" in found and "masks" in found:
        found.remove("masks")  # whatever the settings, those of another vocabulary are others
    what = ", ".join(_WHAT[name] for name in found)
    return f"since they differ in: {what}" if what else ""


def _read(folder: Path) -> Basis | None:
    found = read_summary(folder).get(KEY)
    if found is None:
        return None
    if isinstance(found, dict):
        found = {_TARGET: "", **found}
    if not (isinstance(found, dict) and all(isinstance(found.get(n), str) for n in _WHAT)):
        path = RunFolder(folder).summary
        raise CheckpointError(f"{path}: damaged, '{KEY}' is of the wrong type")
    return {name: found[name] for name in _WHAT}


def _text(folder: Path) -> str | None:
    """Fingerprint of the text that a trained run's bits per byte are of; None if it has none.

    Raises:
        CheckpointError: its summary or metrics are missing or damaged.
    """
    found = read_summary(folder).get(KEY)
    text = found.get(_TEXT) if isinstance(found, dict) else None
    if text is not None and not isinstance(text, str):
        path = RunFolder(folder).summary
        raise CheckpointError(f"{path}: damaged, '{KEY}' is of the wrong type")
    # A method may have other metrics than the loss.
    return text if text and read_history(folder).evaluated(BY_BITS.metric) else None
