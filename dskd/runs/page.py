"""The page that a report is: one HTML file with nothing to load beside it, light or dark as its
reader's screen is, and readable on a narrow one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dskd.system.files import write_atomic
from dskd.system.markup import MOST_TEXTS


def write_page(path: Path, parts: Iterable[str]) -> Path:
    """Write a page of pieces of HTML, of which empty ones are left out; its path is given back.

    Raises:
        DiskError: it cannot be written.
    """
    places = range(2, MOST_TEXTS + 1)
    parts = {
        "@HEADS@": ", ".join(f".text{n} tr > :nth-child({n})" for n in places),
        "@CELLS@": ", ".join(f".text{n} td:nth-child({n})" for n in places),
        "@BODY@": "\n".join(filter(None, parts)),
    }
    page = _PAGE
    for mark, text in parts.items():
        page = page.replace(mark, text)
    write_atomic(path, page.encode(), "the report")
    return path


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>dskd report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #1c1e21; --faint: #626870; --rule: #d9dce0; --stripe: #f5f6f8;
  --right: #1f5fa8; --wrong: #c0392b;
  --line-0: #1f77b4; --line-1: #d9680a; --line-2: #2a8a2a; --line-3: #d62728; --line-4: #8a5fb8;
  --line-5: #8c564b; --line-6: #c95aa6; --line-7: #6f6f6f; --line-8: #8f9016; --line-9: #0f9bab;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --ink: #e3e5e8; --faint: #9aa0a8; --rule: #363b42; --stripe: #1d2024;
    --right: #5a9fe6; --wrong: #f0705f;
    --line-0: #5aa9e6; --line-1: #ff9f4a; --line-2: #5cc46a; --line-3: #f07070; --line-4: #b795e6;
    --line-5: #c8a193; --line-6: #ee9ad2; --line-7: #b0b5bb; --line-8: #d0d05a; --line-9: #4fd3e0;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; max-width: 82rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--page); color: var(--ink);
}
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.note { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.93em; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--rule); text-align: right; }
th { vertical-align: bottom; }
td { white-space: nowrap; }
.text, @HEADS@ { text-align: left; }
@CELLS@ { white-space: normal; min-width: 6rem; overflow-wrap: anywhere; }
.scroll th:first-child, .scroll td:first-child {
  position: sticky; left: 0; background: var(--page); text-align: left; padding-left: 0;
  white-space: normal; overflow-wrap: anywhere; min-width: min(11rem, 40vw);
}
.scroll tr:hover td { background: var(--stripe); }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.5rem 0; padding: 0; }
.legend li { list-style: none; overflow-wrap: anywhere; }
.legend svg { width: 1.6rem; height: 0.7rem; margin-right: 0.4rem; }
.panels {
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
}
.panels.large { grid-template-columns: minmax(0, 40rem); }
figure { margin: 0; }
figcaption { text-align: center; font-size: 0.9rem; }
figure svg {
  display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt;
}
svg text { fill: currentColor; }
summary { cursor: pointer; }
</style>
@BODY@
</html>
"""
