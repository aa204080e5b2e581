"""Rows for a view, made of plain arrays."""

import numpy as np

from dskd.data.prepared import RowBatch


class PlainRows:
    """Rows in memory, read as those of a prepared folder are; row r is of domain r % domains."""

    labelled = by_length = False

    def __init__(self, ids_RT, lengths_R, fingerprint="rows", domains=1):
        self.ids_RT, self.lengths_R, self.domains = ids_RT, lengths_R, domains
        self.fingerprint, self.block_size = fingerprint, ids_RT.shape[1]

    def __len__(self):
        return len(self.ids_RT)

    def rows(self, row_ids_B, epochs_B):
        tokens_BT, lengths_B = self.ids_RT[row_ids_B], self.lengths_R[row_ids_B]
        return RowBatch(row_ids_B, epochs_B, self.domains_B(row_ids_B), tokens_BT, lengths_B)

    def domains_B(self, row_ids_B):
        return row_ids_B % self.domains


def row_batch(ids_B, epochs_B, tokens_BT, lengths_B) -> RowBatch:
    """Rows of domain 0."""
    ids_B, epochs_B = np.asarray(ids_B), np.broadcast_to(epochs_B, len(ids_B))
    return RowBatch(ids_B, epochs_B, np.zeros_like(ids_B), tokens_BT, np.asarray(lengths_B))
