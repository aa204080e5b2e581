"""Batches of plain tensors."""

from typing import Any

import torch
from torch import Tensor

from dskd.batch import Batch

FIELDS = ("row_ids_B", "domains_B", "ids_BT", "mask_BT", "labels_BT")


def batch_of(labels_BT: Tensor, **fields: Any) -> Batch:
    """Rows of domain 0 with these labels; all tokens are real and 1, unless given."""
    rows_B, ones_BT = torch.arange(len(labels_BT)), torch.ones_like(labels_BT)
    plain = {"row_ids_B": rows_B, "domains_B": rows_B * 0, "ids_BT": ones_BT, "mask_BT": ones_BT}
    return Batch.of(**{**plain, "labels_BT": labels_BT, **fields})


def changed(batch: Batch, **fields: Any) -> Batch:
    """The batch with other ``fields``, and without columns unless they are given."""
    return Batch.of(**{**{name: getattr(batch, name) for name in FIELDS}, **fields})
