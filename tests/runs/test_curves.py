"""Curves of a report: what is drawn of long lines, colours of the page, names of runs."""

import re

import pytest

from dskd.runs.curves import Look, _thinned, curves


def line(count: int) -> list[tuple[int, float]]:
    return [(step, float(step * 7919 % 1009)) for step in range(1, count + 1)]


def test_of_a_long_line_the_extremes_of_each_stretch_are_drawn():
    assert _thinned(line(1000)) == line(1000)
    points = line(50_000)
    drawn = _thinned(points)
    assert drawn[0] == points[0] and drawn[-1] == points[-1]
    assert drawn == sorted(drawn) and set(drawn) <= set(points)
    assert 500 < len(drawn) <= 1002
    for begin in range(0, 50_000, 100):
        stretch = points[begin : begin + 100]
        inside = [value for step, value in drawn if begin < step <= begin + 100]
        values = [value for _, value in stretch]
        assert (min(inside), max(inside)) == (min(values), max(values))


def test_panels_are_in_the_colours_of_the_page():
    runs = {f"<{n}>": line(3) for n in range(12)} | {"none": []}
    page = curves("Rates", {"a & b": runs, "empty": {"none": []}}, Look(target=4.0))
    assert page.count("<figure><svg") == 1 and "empty" not in page
    assert "<figcaption>a &amp; b</figcaption>" in page
    legend = re.findall(r'stroke: (\S+)" stroke-dasharray="([^"]*)"/></svg>([^<]*)', page)
    assert legend[1] == ("var(--line-1)", "", "&lt;1&gt;")
    assert legend[11] == ("var(--line-1)", "6 3", "&lt;11&gt;") and len(legend) == 12
    assert "currentColor" in page and "#000000" not in page
    assert not re.search(r"#(1f77b4|ff7f0e)|#ffffff|https?://|DejaVu|<metadata", page)
    assert len(page) < 60_000


@pytest.mark.parametrize("panels", [{}, {"a": {}}, {"a": {"run": []}}])
def test_nothing_to_show_is_nothing(panels):
    assert curves("Rates", panels) == ""
