"""Curves of a report: drawn by matplotlib, written into the page as SVG in the page's own colours
and letters."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from itertools import pairwise

import matplotlib
from matplotlib.figure import Figure

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
_DASHES = ("-", "--", ":", "-.")
"""Of the first ten lines, the next ten, and so on."""

Panels = Mapping[str, Mapping[str, Points]]
"""Panels by title, each with the runs' lines by name."""


def curves(title: str, panels: Panels, *, target: float | None = None) -> str:
    """HTML of panels below a heading, with one legend of all; empty if no panel has a point.

    Args:
        target: a value that is drawn across each panel.
    """
    panels = {name: lines for name, lines in panels.items() if any(lines.values())}
    if not panels:
        return ""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    places = {name: place for place, name in enumerate(names)}
    drawn = {name for lines in panels.values() for name, points in lines.items() if points}
    figures = [
        f"<figure>{svg(_panel(lines, places, target), f'{title} {name}')}"
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, lines in panels.items()
    ]
    legend = _legend({name: place for name, place in places.items() if name in drawn})
    text = "\n".join(figures)
    return f'<h2>{html.escape(title)}</h2>\n{legend}\n<div class="panels">\n{text}\n</div>'


def image(title: str, figure: Figure) -> str:
    """HTML of a figure below its title."""
    text = html.escape(title)
    return f'<h2>{text}</h2>\n<figure style="max-width: none">{svg(figure, title)}</figure>'


def svg(figure: Figure, name: str) -> str:
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


def _panel(lines: Mapping[str, Points], places: Mapping[str, int], target: float | None) -> Figure:
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        if points:
            steps, values = zip(*_thinned(points), strict=True)
            marker = "." if len(points) <= _MARKED else ""
            axes.plot(steps, values, linewidth=1.2, marker=marker, **_style(places[name]))
    if target is not None:
        axes.axhline(target, color="0.5", linewidth=0.8, linestyle="--")
    axes.set_xlabel("optimiser steps")
    axes.set_xlim(left=0)
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


def _style(place: int) -> dict[str, str]:
    """How the line of a run looks in every panel."""
    count = len(_COLOURS)
    dashes = _DASHES[place // count % len(_DASHES)]
    return {"color": _COLOURS[place % count], "linestyle": dashes}


def _legend(places: Mapping[str, int]) -> str:
    return f'<ul class="legend">{"".join(_entry(*item) for item in places.items())}</ul>'


def _entry(name: str, place: int) -> str:
    colour = f"var(--line-{place % len(_COLOURS)})"
    dashes = ("", "6 3", "2 3", "6 3 2 3")[place // len(_COLOURS) % len(_DASHES)]
    line = f'<path d="M0 6H26" style="stroke: {colour}" stroke-dasharray="{dashes}"/>'
    mark = f'<svg viewBox="0 0 26 12" stroke-width="3" aria-hidden="true">{line}</svg>'
    return f"<li>{mark}{html.escape(name)}</li>"
