"""Knowledge Inheritance as plain torch does it: what ``step.py`` compares the fused path with."""

from __future__ import annotations

from dskd.batch import Batch, Positions, Signal, Term, TopK
from dskd.fused import reference
from dskd.methods.ki import KnowledgeInheritance
from dskd.ops import topk_teacher


class EagerInheritance(KnowledgeInheritance):
    """The same loss from whole logits, differentiated by autograd."""

    kind: str = "launch.bench.eager:EagerInheritance"

    def loss(
        self, positions: Positions, signal: Signal | None, batch: Batch, step: int
    ) -> dict[str, Term]:
        del batch
        alpha, heat, student_NV = self.alpha(step), self.temperature**2, positions.logits_NV
        if isinstance(signal, TopK):
            kept = topk_teacher(signal, self.temperature, self.topk)
            parts = (kept.ids_NK, kept.logprobs_NK, kept.tail_N, self.topk)
            kl_N = reference.topk_divergence(student_NV, *parts, temperature=self.temperature)
        else:
            kl_N = reference.divergence(student_NV, signal.logits_NV, temperature=self.temperature)
        ce, kl = reference.cross_entropy(student_NV, positions.labels_N).sum(), kl_N.sum() * heat
        total = (1 - alpha) * ce + alpha * kl
        return {"tokens": Term(total, {"ce": ce.detach(), "kl": kl.detach()})}
