"""What tells runs that are shown side by side apart, besides their scores: sections of a report on
data, settings, versions, and what captures cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskd.runs.about import LIBRARIES, About, Spent
from dskd.runs.card import as_shared
from dskd.settings.folders import RunFolder
from dskd.settings.parsing import show
from dskd.settings.recipe import SINGLE, read
from dskd.settings.run import Run
from dskd.system.log import clock
from dskd.system.markup import html_table

Abouts = Mapping[str, About | None]
"""What runs say about themselves, by name; None: a run of an earlier dskd says nothing."""

_UNKNOWN = "-"
_EXACT = 10.0  # seconds from which on tenths of them say nothing
_SHORT = 8  # characters of a fingerprint
_NEVER = {"out"}  # differs always, and says nothing


def time_text(spent: Spent | None) -> str:
    """A time for a reader: what other runs spent on it is called shared, and counted there."""
    if spent is None:
        return _UNKNOWN
    own = [_clock(spent.own)] if spent.own or not spent.shared else []
    return " + ".join([*own, *([f"{_clock(spent.shared)} shared"] if spent.shared else [])])


def _clock(seconds: float) -> str:
    return clock(seconds) if seconds >= _EXACT else f"{seconds:.1f} s"


def data_section(abouts: Abouts) -> str:
    """HTML of what the runs were trained and evaluated on."""
    header = ["run", "trained on", "rows", "tokens", "evaluated on", "held out", "evaluated"]
    rows = [[name, *_data_cells(about)] for name, about in abouts.items()]
    table = html_table([*header, "fingerprint", "of evaluated rows"], rows)
    return f"<h2>Data</h2>\n{table}"


def _data_cells(about: About | None) -> list[str]:
    if about is None:
        return [_UNKNOWN] * 8
    of = about.data
    held_out = "; ".join(of.validation) or "a share of these"
    numbers = [f"{count:,}" for count in (of.rows, of.tokens, of.held_out, of.evaluated)]
    prints = [of.fingerprint[:_SHORT], of.evaluation[:_SHORT]]
    return ["; ".join(of.sources), *numbers[:2], held_out, *numbers[2:], *prints]


def settings_section(runs: Mapping[str, Path]) -> str:
    """HTML of the settings in which the runs differ, but for those that none of them was given;
    empty where they do not, or only one has its settings in its folder.

    Raises:
        ConfigError: the settings in a run's folder are damaged.
    """
    paths = {name: RunFolder(folder).config for name, folder in runs.items()}
    own = {name: read(path).runs[SINGLE] for name, path in paths.items() if path.is_file()}
    found = {name: _settings(run) for name, run in own.items()}
    given = dict.fromkeys(n for run in own.values() for n in _settings(run, given=True))
    cells = {n: [settings.get(n, _UNKNOWN) for settings in found.values()] for n in given}
    rows = [[name, *values] for name, values in cells.items() if len({*values}) > 1]
    if not rows:
        return ""
    return "<h2>Settings that differ</h2>\n" + html_table(["setting", *found], rows)


def _settings(run: Run, *, given: bool = False) -> dict[str, str]:
    """The settings of a run by their dotted names, as others may read them; of those that were
    ``given`` only the ones that are not as they are by default."""
    tree = as_shared(run.model_dump(mode="json", exclude=_NEVER, exclude_defaults=given), run)
    flat = _flat(tree, "")
    return {n: value if isinstance(value, str) else show(value) for n, value in flat.items()}


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Values by dotted names; a list of sections has its places in them."""
    if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        value = dict(enumerate(value))
    if not (isinstance(value, dict) and value):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def capture_section(abouts: Abouts) -> str:
    """HTML of what the runs' caches cost; empty where none is known to have one."""
    rows = []
    for name, about in abouts.items():
        if about is None or about.capture is None:
            continue
        of = about.capture
        counts = [f"{count:,}" for count in (of.rows, of.tokens, of.passes)]
        rows.append([name, time_text(of.seconds), *counts, f"{of.bytes / 2**20:,.1f} MiB"])
    if not rows:
        return ""
    header = ["run", "time", "rows", "tokens", "teacher passes", "on disk"]
    return "<h2>What the caches cost</h2>\n" + html_table(header, rows)


def versions_section(abouts: Abouts) -> str:
    """HTML of when, where and by what the runs were trained."""
    rows = [[name, *_version_cells(about)] for name, about in abouts.items()]
    header = ["run", "trained until", "device", "ranks", "dskd", "python", *LIBRARIES]
    return "<h2>When and by what</h2>\n" + html_table(header, rows)


def _version_cells(about: About | None) -> list[str]:
    if about is None:
        return [_UNKNOWN] * (5 + len(LIBRARIES))
    libraries = [about.libraries.get(name, _UNKNOWN) for name in LIBRARIES]
    ended = about.ended.replace("T", " ").replace("+00:00", " UTC")
    return [ended, about.device, str(about.ranks), about.dskd, about.python, *libraries]
