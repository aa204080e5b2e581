"""Teachers by domain: each row's logits are those of its own domain's teacher."""

import numpy as np
import pytest
import torch

from dskd.batch import Batch
from dskd.data.prepared import RowBatch
from dskd.data.views import Shown
from dskd.teachers.teacher import FrozenTeacher, RoutedTeachers, group_by_domain
from tests.batches import changed
from tests.heads import logits_of
from tests.teachers.test_teacher_self import VOCABULARY, masked_batch, student


def routed_batch(domains: list[int]) -> Batch:
    """The masked batch of some domains, with the columns that the loader adds."""
    batch, _ = masked_batch()
    tensors = (batch.row_ids_B, batch.row_ids_B * 0, torch.tensor(domains), batch.ids_BT)
    rows = RowBatch(*(tensor.numpy() for tensor in (*tensors, batch.lengths_B)))
    shown = Shown(batch.ids_BT.numpy(), batch.labels_BT.numpy())
    columns = {name: torch.from_numpy(a) for name, a in group_by_domain(rows, shown).items()}
    return changed(batch, domains_B=torch.tensor(domains), columns=columns)


@pytest.mark.parametrize("domains", [[0, 0, 0, 0], [1, 0, 1, 0], [2, 2, 0, 1], [2, 1, 2, 2]])
def test_each_row_has_its_domains_logits(domains):
    batch = routed_batch(domains)
    teachers = {}
    for domain in (2, 0, 1):  # in any order
        model = student(dtype=torch.float32)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.mul_(domain + 1)
        teachers[domain] = FrozenTeacher(model, VOCABULARY)
    found_NV = logits_of(RoutedTeachers(teachers)(batch))
    whole = {domain: logits_of(teacher(batch)) for domain, teacher in teachers.items()}
    domain_N = batch.domains_B.repeat_interleave(batch.counts_B).tolist()
    wanted_NV = torch.stack([whole[domain][n] for n, domain in enumerate(domain_N)])
    assert len(found_NV) == batch.supervised
    torch.testing.assert_close(found_NV, wanted_NV, rtol=1e-5, atol=1e-5)


def test_every_teacher_runs_once_even_without_a_row():
    batch, calls = routed_batch([1, 1, 1, 1]), []

    class Counted(FrozenTeacher):
        def __call__(self, batch: Batch):
            calls.append((len(batch.row_ids_B), batch.supervised, len(batch.ids_BT)))
            return super().__call__(batch)

    RoutedTeachers({d: Counted(student(dtype=torch.float32), VOCABULARY) for d in range(3)})(batch)
    assert calls == [(1, 0, 1), (4, batch.supervised, 4), (1, 0, 1)]


def test_the_columns_are_of_rows_and_positions():
    batch = routed_batch([2, 0, 2, 1])
    rows_B, places_N, positions_N = (column.numpy() for column in batch.columns.values())
    assert rows_B.tolist() == [1, 3, 0, 2]
    assert sorted(places_N.tolist()) == list(range(batch.supervised))
    alone_BT = batch.labels_BT.numpy()[[0, 2]].reshape(-1)  # the rows of domain 2
    counts_B = batch.counts_B.numpy()
    of_two = positions_N[counts_B[[1, 3]].sum() :]
    wanted_N = np.concatenate([row[row >= 0] for row in batch.labels_BT.numpy()[[0, 2]]])
    assert alone_BT[of_two].tolist() == wanted_N.tolist()
