"""The loss by which the experts of a mixture (MoE) get about as many tokens each.

HuggingFace's is that of the Switch Transformer (Fedus et al. 2022, equations 4 to 6): with f_e how
many of the tokens' top-k choices were expert e, and P_e the mean of its probabilities, both over
all tokens and layers of a batch,

    router_aux_loss_coef * E sum_e f_e P_e.

A product of two means over a batch is no sum over its rows: cut into micro-batches or over ranks, a
batch has another value, so that HuggingFace's depends on how it is cut. Here the formula is taken
of each row by itself (as DeepSeek-V3's sequence-wise balance loss does, DeepSeek-AI 2024, section
2.1.2), f_e and P_e over its real tokens and all layers with routers. Rows weigh as many supervised
positions as they have, and the sum is divided by those of the whole step, as every loss is here:
one value for any micro-batch, world and ZeRO stage. Of one row it is HuggingFace's; of several it
asks a little more: that the tokens of each row go to all experts, not only those of all together.

It is added in training whenever the config has a coefficient above 0, whatever the config says of
``output_router_logits``, on which it hangs in HuggingFace's own forward. Teachers, evaluations and
gradients of other losses have none.

Shape letters: B rows, T tokens, E experts, K of them that a token goes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dskd.batch import Batch, Positions, Term
from dskd.errors import ConfigError
from dskd.fused.arguments import wide

BALANCE = "balance"
"""Name of the term, and of its part in the log, which has no coefficient."""
_COEFFICIENT = "router_aux_loss_coef"


@dataclass(frozen=True)
class Balance:
    """The balance loss of one student.

    Attributes:
        coefficient: above 0.
        chosen: experts that a token goes to.
        model_type: of the student, for messages.
    """

    coefficient: float
    chosen: int
    model_type: str

    def term(self, positions: Positions, batch: Batch) -> Term:
        """The weighted sum over the rows of a micro-batch, fp32 with a gradient.

        Args:
            positions: with the logits of the student's routers.
            batch: what they are of, on their device; nothing waits for it.

        Raises:
            ConfigError: the student puts out none.
        """
        self.check(positions.routers)
        loss_B = row_balance(positions.routers, batch.mask_BT, self.chosen)
        total = (loss_B * batch.supervised_BT.sum(1)).sum()
        return Term(self.coefficient * total, {BALANCE: total.detach()})

    def check(self, routers: Sequence[Tensor] | None) -> None:
        """Refuse a student that puts out no logits of its routers.

        Raises:
            ConfigError: ``routers``, which it puts out, are none.
        """
        if not routers:
            raise ConfigError(
                f"model.config.{_COEFFICIENT}: {self.coefficient}, but a {self.model_type} puts "
                f"out no logits of its routers here; set it to 0"
            )


def balance_of(config: PreTrainedConfig) -> Balance | None:
    """The balance loss that a student of this config is trained with; None without routers, or with
    a coefficient of 0.

    Raises:
        ConfigError: the coefficient is below 0 or not finite, or the config does not say how many
            experts a token goes to.
    """
    coefficient = getattr(config, _COEFFICIENT, None) or 0.0
    chosen = getattr(config, "num_experts_per_tok", None)
    name = f"model.config.{_COEFFICIENT}"
    if not 0 <= coefficient < torch.inf:
        raise ConfigError(f"{name}: must be a number from 0 on, not {coefficient}")
    if coefficient == 0:
        return None
    if not isinstance(chosen, int):
        raise ConfigError(
            f"{name}: {coefficient}, but the config of a {config.model_type} does not say how many "
            f"experts a token goes to (num_experts_per_tok); set it to 0"
        )
    return Balance(float(coefficient), chosen, config.model_type)


def row_balance(routers: Sequence[Tensor], mask_BT: Tensor, chosen: int) -> Tensor:
    """``E sum_e f_e P_e`` of each row [B], over its real tokens and all layers: ``chosen`` if
    they go to all experts alike. In fp32 (float64 for float64 logits).

    Args:
        routers: of each layer with experts the logits of its router, [B * T, E] or [B, T, E].
        mask_BT: 1 for real tokens, of which each row has some.
        chosen: experts that a token goes to.
    """
    rows, tokens = mask_BT.shape
    experts, dtype = routers[0].shape[-1], wide(routers[0].dtype)
    real_BT = mask_BT.to(dtype)
    chosen_BTK = real_BT[:, :, None].expand(rows, tokens, chosen)
    choices_BE = real_BT.new_zeros(rows, experts)
    mass_BE = real_BT.new_zeros(rows, experts)
    for logits in routers:
        shares_BTE = logits.view(rows, tokens, experts).softmax(-1, dtype=dtype)
        ids_BTK = shares_BTE.topk(chosen, -1).indices
        choices_BE = choices_BE.scatter_add(1, ids_BTK.flatten(1), chosen_BTK.flatten(1))
        mass_BE = mass_BE + (shares_BTE * real_BT[:, :, None]).sum(1)
    counted_B = len(routers) * real_BT.sum(1)
    return experts * (choices_BE * mass_BE).sum(1) / counted_B.square()
