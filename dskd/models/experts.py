"""Which of HuggingFace's ways the experts of a mixture (MoE) are computed in."""

from __future__ import annotations

from transformers import PreTrainedModel


def compute_without_values(model: PreTrainedModel) -> None:
    """Have the experts computed in the one way that reads no values, so that a model on ``meta``
    can run: by products with a copy of its experts for each token."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
