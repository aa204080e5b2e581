"""Small rows, masks and a teacher for the tests of the store, the cache and the sweep."""

import numpy as np
import torch

from dskd.batch import IGNORE, DenseTeacher
from dskd.data.views import Shown
from dskd.fused.topk_teacher import largest
from dskd.stores.logits import CachedLogits, CachedMasks
from dskd.stores.store import Writer
from tests.data.row_batches import PlainRows

MASK = 4


class ToyRows(PlainRows):
    """Rows of 2 to ``block_size`` tokens drawn once, as wide as the longest of a batch."""

    def __init__(self, rows=23, block_size=16, vocabulary=50, domains=1, equal=False):
        random = np.random.RandomState(5)
        low = block_size if equal else 2
        lengths_R = random.randint(low, block_size + 1, rows).astype(np.int64)
        ids_RT = random.randint(5, vocabulary, (rows, block_size)).astype(np.int64)
        super().__init__(ids_RT, lengths_R, "toy-rows", domains)

    def rows(self, row_ids_B, epochs_B):
        lengths_B = self.lengths_R[row_ids_B]
        width = min(-(-int(lengths_B.max()) // 8) * 8, self.block_size)
        ids_BT = np.where(np.arange(width) < lengths_B[:, None], self.ids_RT[row_ids_B, :width], 1)
        return super().rows(row_ids_B, epochs_B)._replace(tokens_BT=ids_BT)


class ToyMasks:
    """Each token of a row is masked with probability 0.3: some rows have no masked one."""

    def __init__(self, draws=2):
        self.draws = draws
        self.fingerprint = "toy-masks"

    def __call__(self, rows):
        ids_BT = rows.tokens_BT
        inputs_BT, labels_BT = ids_BT.copy(), np.full_like(ids_BT, IGNORE)
        for b, (row, epoch) in enumerate(zip(rows.ids_B, rows.epochs_B, strict=True)):
            chosen = np.random.RandomState(1000 * (epoch % self.draws) + row).rand(999) < 0.3
            chosen = np.flatnonzero(chosen[: rows.lengths_B[b]])
            labels_BT[b, chosen] = ids_BT[b, chosen]
            inputs_BT[b, chosen] = np.where(chosen % 5 == 0, 5 + chosen, MASK)
        return Shown(inputs_BT, labels_BT)


def read(cache, rows, *, use_k=None, temperature=2.0):
    """What a cache gives for some rows: inputs, labels, and the columns of the logits."""
    shown = CachedMasks(cache)(rows)
    return *shown, CachedLogits(cache, use_k, temperature)(rows, shown)


def encoded(layout, batch, logits_NV):
    """The cache's columns of a teacher's logits."""
    return layout.encode(batch, largest(logits_NV, layout.k, layout.temperatures))


def write_store(folder, spec, content):
    """Fill a store without a model; ``content(draw, row_ids)`` is positions a row and columns."""
    writer = Writer(folder, spec)
    writer.prepare()
    for shard in range(spec.shards):
        draw, begin, end = spec.span(shard)
        counts, columns = content(draw, np.arange(begin, end))
        writer.write_shard(shard, counts, np.ones(end - begin, bool), columns)
    writer.finish(writer.records)


def flip(path, place=-1):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def files(folder):
    """The bytes of every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class ToyTeacher:
    """Logits that depend on the whole row up to the position; counts its calls."""

    def __init__(self, vocabulary=50, hidden=8):
        generator = torch.Generator().manual_seed(7)
        self._embedding = torch.randn(vocabulary, hidden, generator=generator)
        self._head = torch.randn(hidden, vocabulary, generator=generator)
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        hidden_BTD = torch.tanh(self._embedding[batch.ids_BT].cumsum(1))
        return DenseTeacher(hidden_BTD[batch.supervised_BT] @ self._head)
