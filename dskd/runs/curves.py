"""Curves of a report: drawn by matplotlib, written into the page as SVG in the page's own colours
and letters."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dskd.runs.history import Points

_MARKED = 60
"""A line of at most so many points shows each of them."""
_STRETCHES = 500
"""Of a longer line than twice this, the highest and the lowest point of each of so many stretches
are drawn: all that could be told apart."""
_COLOURS = tuple(
    "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()  # noqa: SIM905
)
"""What matplotlib draws lines in, one after the other; the page says what each looks like."""
_DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 3 2 3"}
"""Lines of the first ten runs, the next ten, and so on: for matplotlib, and for a legend."""


class _Style(NamedTuple):
    """A line's place in ``_COLOURS``, and a key of ``_DASHES``."""

    place: int
    dashes: str


Panels = Mapping[str, Mapping[str, Points]]
"""Panels by title, each with the runs' lines by name."""


@dataclass(frozen=True)
class Look:
    """How panels look.

    Attributes:
        across: what is counted from the left to the right, from ``begin`` on.
        y_limits: of the values; None: as the lines have them.
        target: a value that is drawn across each panel.
        large: one panel in a line, in letters of the same size.
        dashed: names of the lines that are.
    """

    across: str = "optimiser steps"
    begin: float = 0.0
    y_limits: tuple[float, float] | None = None
    target: float | None = None
    large: bool = False
    dashed: frozenset[str] = frozenset()


def curves(title: str, panels: Panels, look: Look = Look()) -> str:
    """HTML of panels below a heading, with one legend of all; empty if no panel has a point."""
    panels = {name: lines for name, lines in panels.items() if any(lines.values())}
    if not panels:
        return ""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    styles = {name: _style(n, dashed=name in look.dashed) for n, name in enumerate(names)}
    drawn = {name for lines in panels.values() for name, points in lines.items() if points}
    panels_of = {name: _panel(lines, styles, look) for name, lines in panels.items()}
    legend = "".join(_entry(name, *style) for name, style in styles.items() if name in drawn)
    return figures(title, panels_of, f'<ul class="legend">{legend}</ul>\n', large=look.large)


def figures(
    title: str, panels: Mapping[str, Figure], legend: str = "", *, large: bool = False
) -> str:
    """HTML of figures by their captions, below a heading and maybe a legend of all.

    Args:
        panels: drawn in matplotlib's own cycle of colours, black, and greys.
        large: one in a line, in letters of the same size.
    """
    shown = "\n".join(
        f"<figure>{_svg(figure, f'{title} {name}')}"
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, figure in panels.items()
    )
    kind = "panels large" if large else "panels"
    return f'<h2>{html.escape(title)}</h2>\n{legend}<div class="{kind}">\n{shown}\n</div>'


def _svg(figure: Figure, name: str) -> str:
    """A figure as SVG for the middle of a page.

    Args:
        name: of this figure alone, from which the names inside it are made.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg) .*?(viewBox="[^"]*").*?>', r'\1 role="img" \2>', text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold in all the page
    text = re.sub(r"\bfont: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = re.sub(r"\bfont-family: [^;\"]+", "", text)
    for place, colour in enumerate(_COLOURS):
        text = text.replace(colour, f"var(--line-{place})")
    return text.replace("#000000", "currentColor").strip()


def _panel(lines: Mapping[str, Points], styles: Mapping[str, _Style], look: Look) -> Figure:
    figure = Figure(figsize=(6.4, 3.6) if look.large else (4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        if points:
            steps, values = zip(*_thinned(points), strict=True)
            style = {"color": _COLOURS[styles[name].place], "linestyle": styles[name].dashes}
            marker = "." if len(points) <= _MARKED else ""
            axes.plot(steps, values, linewidth=1.2, marker=marker, **style)
    if look.target is not None:
        axes.axhline(look.target, color="0.5", linewidth=0.8, linestyle="--")
    axes.set_xlabel(look.across)
    axes.set_xlim(left=look.begin)
    axes.set_ylim(look.y_limits)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    return figure


def _thinned(points: Points) -> Points:
    """What is drawn of a line."""
    if len(points) <= 2 * _STRETCHES:
        return points
    ends = [round(len(points) * n / _STRETCHES) for n in range(_STRETCHES + 1)]
    stretches = (points[a:b] for a, b in pairwise(ends))
    pairs = ({min(s, key=_value), max(s, key=_value)} for s in stretches)
    return [points[0], *(p for pair in pairs for p in sorted(pair)), points[-1]]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _style(number: int, *, dashed: bool) -> _Style:
    """How the line of a run looks in every panel."""
    turn, place = divmod(number, len(_COLOURS))
    dashes = [*_DASHES]
    return _Style(place, dashes[1] if dashed else dashes[turn % len(dashes)])


def _entry(name: str, place: int, dashes: str) -> str:
    style = f'style="stroke: var(--line-{place})" stroke-dasharray="{_DASHES[dashes]}"'
    line = f'<path d="M0 6H26" {style}/>'
    mark = f'<svg viewBox="0 0 26 12" stroke-width="3" aria-hidden="true">{line}</svg>'
    return f"<li>{mark}{html.escape(name)}</li>"
