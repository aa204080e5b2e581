"""Pieces of HTML that several parts of a report are made of."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+]?[\d.]")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, the first of each row its name, which stays in sight where the others
    are scrolled. Columns of numbers end at the right, those of texts begin at the left."""
    kinds = ["", *(_kind([row[place] for row in rows]) for place in range(1, len(header)))]
    lines = ["".join(_cell("th", *cell) for cell in zip(header, kinds, strict=True))]
    lines += ["".join(_cell("td", *cell) for cell in zip(row, kinds, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n{body}\n</table></div>'


def _kind(column: Sequence[str]) -> str:
    told = [cell for cell in column if cell not in ("", "-")]
    return ' class="text"' if told and not any(map(_NUMBER.match, told)) else ""


def _cell(name: str, text: str, kind: str) -> str:
    return f"<{name}{kind}>{html.escape(text)}</{name}>"
