"""Vanilla distillation from several teachers: the logits of all of them together are one
classifier's (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", of their
concatenation)."""

from __future__ import annotations

from typing import Literal

from dskd.methods.base import Method
from dskd.methods.panel import AllLogits


class VanillaDistillation(AllLogits, Method):
    """The KL of the student from the softmax of all teachers' logits."""

    kind: Literal["vkd"] = "vkd"
