"""Pieces of HTML that several parts of a report are made of."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

MOST_TEXTS = 24
"""Columns of a table, from the left, that may be of texts (``runs/page.py``)."""
_NUMBER = re.compile(r"[-+]?[\d.]")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, the first of each row its name, which stays in sight where the others
    are scrolled. Columns of numbers end at the right, those of texts begin at the left."""
    lines = [[f"<th>{html.escape(cell)}</th>" for cell in header]]
    lines += [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in rows]
    body = "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    texts = [f"text{n}" for n in range(2, len(header) + 1) if _is_text([r[n - 1] for r in rows])]
    kind = f' class="{" ".join(texts)}"' if texts else ""
    return f'<div class="scroll"><table{kind}>\n{body}\n</table></div>'


def _is_text(column: Sequence[str]) -> bool:
    """Whether none of the cells that say something begins as a number does."""
    told = [cell for cell in column if cell not in ("", "-")]
    return bool(told) and not any(map(_NUMBER.match, told))
