"""Pieces of HTML that several parts of a report are made of."""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    lines = [[f"<th>{html.escape(cell)}</th>" for cell in header]]
    lines += [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines) + "\n</table>"
