"""A flat shard of a matrix as rectangles of it, at most three a matrix.

Under ZeRO a rank holds the flat entries ``start`` to ``start + n`` of a parameter: the rest of a
row, then whole rows, then the beginning of one. Each is a rectangle, of which rows, columns and the
diagonal are views, so that a rule edits it in place without an index per entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from dskd.shards import Shard


@dataclass(frozen=True)
class Tile:
    """A rectangle [R, C] of a matrix (a vector is a matrix of one row), as views into a shard.

    Attributes:
        row: its first row in the matrix.
        column: its first column.
    """

    weight_RC: Tensor
    gradient_RC: Tensor | None
    row: int
    column: int
    moments: Mapping[str, Tensor]

    def along(self, values_K: Tensor, side: str) -> Tensor:
        """Its own of the values of each row (``right``), else of each column; to be broadcast."""
        rows, columns = self.weight_RC.shape
        if side == "right":
            return values_K[self.row : self.row + rows, None]
        return values_K[None, self.column : self.column + columns]

    def diagonal(self) -> Tensor:
        """The matrix's diagonal entries that lie in it, a view."""
        return self.weight_RC.diagonal(self.row - self.column)

    def on_diagonal(self, values_K: Tensor) -> Tensor:
        """Those of the values that stand at its diagonal entries."""
        first = max(self.row, self.column)
        return values_K[first : first + len(self.diagonal())]

    def compactor(self) -> Tensor:
        """C = I + D of these entries, a copy [R, C]."""
        compactor_RC = self.weight_RC.clone()
        compactor_RC.diagonal(self.row - self.column).add_(1)
        return compactor_RC


def tiles(shard: Shard) -> Iterator[Tile]:
    """The rectangles of a shard of a vector [K], a matrix [R, C] or stacked ones [parts, R, C]."""
    _, rows, columns = (1, 1, 1, *shard.shape)[-3:]
    flat, end = shard.start, shard.start + shard.weight.numel()
    while flat < end:
        row, column = divmod(flat, columns)
        row %= rows
        whole_rows = min((end - flat) // columns, rows - row) if column == 0 else 0
        width = columns if whole_rows else min(columns - column, end - flat)
        size = max(whole_rows, 1) * width
        yield _tile(shard, slice(flat - shard.start, flat - shard.start + size), width, row, column)
        flat += size


def _tile(shard: Shard, piece: slice, width: int, row: int, column: int) -> Tile:
    def view(values: Tensor) -> Tensor:
        return values[piece].view(-1, width)

    gradient = None if shard.gradient is None else view(shard.gradient)
    moments = {name: view(values) for name, values in shard.moments.items()}
    return Tile(view(shard.weight), gradient, row, column, moments)
