"""What is made of a model's logits where no loss is: chunk by chunk, in the forward of its head.

Shape letters: N tokens, C of them in a chunk, V columns of the head, W real tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from dskd.batch import SAME, Projection, logit_map
from dskd.fused.chunking import chunk_of, chunks


@torch.no_grad()
def through_head(
    projection: Projection,
    hidden_ND: Tensor,
    vocabulary: int,
    use: Callable[[slice, Tensor], Sequence[Tensor]],
    *,
    bytes_per_logit: int,
) -> tuple[Tensor, ...]:
    """What ``use`` makes of the logits of all tokens, without gradient.

    With w bytes of an element of the model it takes, beside hidden states and weights,
    ``C W (w + bytes_per_logit)`` bytes (4 w, where there is a logit map), which are held to the
    budget of a chunk, and twice the results.

    Args:
        projection: the head, which is called once whatever N is.
        hidden_ND: what it takes.
        vocabulary: W; what the head has beyond is padding, of which no logits are made.
        use: makes tensors of C rows of the tokens ``rows`` and their logits [C, W] in the model's
            dtype; called once, with C = 0, where there are no tokens.
        bytes_per_logit: what that takes for each logit at the most.

    Returns:
        The tensors, of N rows.
    """

    def inside(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, ...]:
        weight_WD = weight_VD[:vocabulary]
        bias_W = None if bias_V is None else bias_V[:vocabulary]
        own = hidden_ND.dtype.itemsize
        each = own + bytes_per_logit + (0 if logit_map(projection) == SAME else 3 * own)
        size = chunk_of(len(hidden_ND), vocabulary, each, hidden_ND.device)
        spans = [*chunks(len(hidden_ND), size)] or [slice(0, 0)]
        of = logit_map(projection).of
        found = [use(rows, of(linear(hidden_ND[rows], weight_WD, bias_W))) for rows in spans]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    return projection(hidden_ND, inside)
