"""Views and readers by domain: every row gets its own domain's, whatever the order."""

import numpy as np

from dskd.batch import IGNORE
from dskd.data.prepared import RowBatch
from dskd.data.routed import RoutedReader, RoutedView
from dskd.data.views import Shown


class Marked:
    """Each row's places from ``domain`` on are predicted, and shown as ``-domain``."""

    draws = 2

    def __init__(self, domain):
        self.domain = domain
        self.fingerprint = f"marked-{domain}"

    def __call__(self, rows):
        assert (rows.domains_B == self.domain).all()
        places = np.arange(rows.tokens_BT.shape[1]) >= self.domain
        labels_BT = np.where(places, rows.tokens_BT, IGNORE)
        return Shown(np.where(places, -self.domain, rows.tokens_BT), labels_BT)


def read(size):
    """Reads ``size`` values of each position, and one."""

    def reader(rows, shown):
        labels_N = shown.labels_BT[shown.labels_BT != IGNORE]
        assert len(rows.ids_B) == len(shown.labels_BT)
        return {"many": np.repeat(labels_N[:, None], size, 1), "one": labels_N.astype(np.float32)}

    return reader


ROWS = RowBatch(
    ids_B=np.array([7, 3, 9, 1]),
    epochs_B=np.zeros(4, np.int64),
    domains_B=np.array([2, 0, 2, 1]),
    tokens_BT=np.arange(12).reshape(4, 3) + 10,
    lengths_B=np.full(4, 3),
)


def test_each_row_is_its_domains():
    view = RoutedView({domain: Marked(domain) for domain in range(3)})
    shown = view(ROWS)
    assert shown.inputs_BT.tolist() == [[10, 11, -2], [0, 0, 0], [16, 17, -2], [19, -1, -1]]
    assert view.draws == 2
    reader = RoutedReader({0: read(1), 1: read(4), 2: read(2)}, {"many": -1, "one": 0})
    columns = reader(ROWS, shown)
    wanted = [12, 13, 14, 15, 18, 20, 21]
    assert columns["one"].tolist() == wanted == shown.labels_BT[shown.labels_BT != IGNORE].tolist()
    assert columns["one"].dtype == np.float32 and columns["many"].dtype == np.int64
    sizes = [2, 1, 1, 1, 2, 4, 4]
    assert columns["many"].tolist() == [
        [label] * size + [-1] * (4 - size) for label, size in zip(wanted, sizes, strict=True)
    ]


def test_a_domain_without_rows_is_not_read():
    view = RoutedView({domain: Marked(domain) for domain in range(3)})
    some = ROWS.select(np.array([1, 3]))
    assert view(some).labels_BT.shape == (2, 3)
    columns = RoutedReader({0: read(1), 1: read(4)}, {"many": -1, "one": 0})(some, view(some))
    assert columns["many"].shape == (5, 4)


def test_its_fingerprint_is_of_all_domains():
    views = [Marked(0), Marked(1)]
    one = RoutedView(dict(enumerate(views)))
    assert one.fingerprint != RoutedView({0: views[1], 1: views[0]}).fingerprint
