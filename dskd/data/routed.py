"""Views and readers that differ by domain: each row goes to its own domain's.

Shape letters: B rows, T tokens, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dskd.batch import IGNORE
from dskd.data.prepared import RowBatch
from dskd.data.views import Reader, Shown, View
from dskd.system.files import fingerprint


class RoutedView:
    """The view of each row is that of its domain.

    Args:
        by_domain: by index of the domain in ``Prepared.domains``, all with as many draws.
    """

    def __init__(self, by_domain: Mapping[int, View]) -> None:
        self._by_domain = by_domain
        (self.draws,) = {view.draws for view in by_domain.values()}
        prints = {str(domain): view.fingerprint for domain, view in by_domain.items()}
        self.fingerprint = fingerprint({"view": "routed", "domains": prints})

    def __call__(self, rows: RowBatch) -> Shown:
        """See :class:`~dskd.data.views.View`."""
        shown = Shown(np.empty_like(rows.tokens_BT), np.empty_like(rows.tokens_BT))
        for domain in np.unique(rows.domains_B).tolist():
            here_B = rows.domains_B == domain
            part = self._by_domain[domain](rows.select(here_B))
            shown.inputs_BT[here_B], shown.labels_BT[here_B] = part
        return shown


class RoutedReader:
    """The columns of each position come from the reader of its row's domain.

    Args:
        by_domain: by index of the domain; all make the same columns, with an axis N and maybe
            another, whose length may differ.
        unused: what fills the further entries of a column where another domain has more of them.
    """

    def __init__(self, by_domain: Mapping[int, Reader], unused: Mapping[str, float]) -> None:
        self._by_domain = by_domain
        self._unused = unused

    def __call__(self, rows: RowBatch, shown: Shown) -> dict[str, np.ndarray]:
        """See :class:`~dskd.data.views.Reader`."""
        parts = {}
        for domain in np.unique(rows.domains_B).tolist():
            here_B = rows.domains_B == domain
            here = Shown(shown.inputs_BT[here_B], shown.labels_BT[here_B])
            parts[domain] = self._by_domain[domain](rows.select(here_B), here)
        domain_N = np.repeat(rows.domains_B, (shown.labels_BT != IGNORE).sum(1))
        columns = {}
        for name, unused in self._unused.items():
            arrays = {domain: part[name] for domain, part in parts.items()}
            most = tuple(np.max([array.shape[1:] for array in arrays.values()], axis=0))
            dtype = next(iter(arrays.values())).dtype
            columns[name] = np.full((len(domain_N), *map(int, most)), unused, dtype)
            for domain, array in arrays.items():
                inner = tuple(slice(size) for size in array.shape[1:])
                columns[name][(domain_N == domain, *inner)] = array
        return columns
