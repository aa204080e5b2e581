"""Queries of WikiSQL (Zhong et al. 2017) as a model writes them, read as logical forms.

``select [AGGREGATOR] COLUMN from table [where COLUMN OPERATOR VALUE [and ..]]``, in lower case.
Columns are those of a table that come nearest to what is written, as in the code of LAMOL and
L2KD, whose reading this follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_AGGREGATORS = ["", "max", "min", "count", "sum", "avg"]
_OPERATORS = ["=", ">", "<"]
_OPERATOR = re.compile("|".join(_OPERATORS))

QUERY_KEYS = '{"sql": {"sel", "agg", "conds"}, "table": {"header": [..]}}'
"""What an entry of the answer file has, for messages."""


class LogicalForm(NamedTuple):
    """A query.

    Attributes:
        column: index of the selected column.
        aggregator: index of what is done with its values; 0: nothing.
        conditions: of each the index of its column, that of its operator (``= > <``), and its value
            in lower case without spaces; in their order.
    """

    column: int
    aggregator: int
    conditions: list[tuple[int, int, str]]


def logical_form(query: str, header: Sequence[str]) -> LogicalForm | None:
    """What a query says, given the names of the columns of its table; None: it cannot be read.

    As in the original, a query with ``and`` within a value is only read if that is the last one.
    """
    # A tie goes to the longer name.
    columns = sorted(((name.lower(), index) for index, name in enumerate(header)), key=_by_length)
    select, has_conditions, rest = query.partition("where")
    words = select.split()[1:-2]  # without `select`, `from` and `table`
    whole, shorter = " ".join(words), " ".join(words[1:])
    nearness = [_nearness(name, text) for name, _ in columns for text in (whole, shorter)]
    best = nearness.index(max(nearness))
    aggregator = 0
    if best % 2:
        if words[0] not in _AGGREGATORS:
            return None
        aggregator = _AGGREGATORS.index(words[0])
    conditions = _conditions(rest, columns) if has_conditions else []
    if conditions is None:
        return None
    return LogicalForm(columns[best // 2][1], aggregator, conditions)


def _by_length(column: tuple[str, int]) -> int:
    return -len(column[0])


def _conditions(text: str, columns: list[tuple[str, int]]) -> list[tuple[int, int, str]] | None:
    operators = _OPERATOR.findall(text)
    if not operators:
        return None
    # Between two operators stand a value and, behind `and`, the next column.
    first, *middle, last = (piece.strip() for piece in _OPERATOR.split(text))
    parts = [first, *(part for piece in middle for part in piece.split("and")), last]
    if len(parts) != 2 * len(operators):
        return None
    found = []
    for operator, name, value in zip(operators, parts[::2], parts[1::2], strict=True):
        nearness = [_nearness(column, name) for column, _ in columns]
        index = columns[nearness.index(max(nearness))][1]
        found.append((index, _OPERATORS.index(operator), "".join(value.split())))
    return found


def same_query(predicted: str, detail: Any) -> bool:
    """Whether a text says the query of an entry of the answer file (:func:`is_query`)."""
    query = detail["sql"]
    conditions = [(c, o, str(value).lower().replace(" ", "")) for c, o, value in query["conds"]]
    wanted = LogicalForm(query["sel"], query["agg"], conditions)
    return logical_form(predicted, detail["table"]["header"]) == wanted


def is_query(detail: Any) -> bool:
    """Whether an entry of an answer file holds a query and the columns of its table."""
    if not isinstance(detail, dict):
        return False
    query, table = detail.get("sql"), detail.get("table")
    if not isinstance(query, dict) or not isinstance(table, dict):
        return False
    conditions, header = query.get("conds"), table.get("header")
    return (
        isinstance(query.get("sel"), int)
        and isinstance(query.get("agg"), int)
        and isinstance(conditions, list)
        and all(isinstance(c, list) and len(c) == 3 for c in conditions)
        and isinstance(header, list)
        and len(header) > 0
        and all(isinstance(name, str) for name in header)
    )


def _nearness(one: str, other: str) -> float:
    """The longest common subsequence as a share of the longer text; equals by their longest common
    substring, then by the shorter text."""
    if not one and not other:
        return 0.0
    below, runs_below = [0] * (len(other) + 1), [0] * (len(other) + 1)
    longest = 0
    for letter in one:
        row, runs = [0], [0]
        for n, that in enumerate(other, 1):
            same = letter == that
            row.append(below[n - 1] + 1 if same else max(below[n], row[-1]))
            runs.append(runs_below[n - 1] + 1 if same else 0)
        longest = max(longest, *runs)
        below, runs_below = row, runs
    shorter, longer = sorted((len(one), len(other)))
    return below[-1] / longer + longest / 1e4 - shorter / 1e8
