"""Knowledge Inheritance as plain torch does it: what ``step.py`` compares the fused path with."""

from __future__ import annotations

from dskd.batch import Batch, Rows, Signal, Term, TopKTeacher
from dskd.fused import reference
from dskd.fused.per_token import at_temperature
from dskd.methods.ki import KnowledgeInheritance


class EagerInheritance(KnowledgeInheritance):
    """The same loss from whole logits, differentiated by autograd."""

    kind: str = "launch.bench.eager:EagerInheritance"

    def loss(self, rows: Rows, signal: Signal | None, batch: Batch, step: int) -> dict[str, Term]:
        del batch
        alpha, heat, student_NV = self.alpha(step), self.temperature**2, rows.logits_NV
        if isinstance(signal, TopKTeacher):
            tail_N = signal.tail_N[self.temperature] if self.topk == "tail" else None
            kept = at_temperature(signal.logprobs_NK, tail_N, self.temperature)
            parts = (signal.ids_NK, *kept, self.topk)
            kl_N = reference.topk_divergence(student_NV, *parts, temperature=self.temperature)
        else:
            kl_N = reference.divergence(student_NV, signal.logits_NV, temperature=self.temperature)
        ce, kl = reference.cross_entropy(student_NV, rows.labels_N).sum(), kl_N.sum() * heat
        total = (1 - alpha) * ce + alpha * kl
        return {"tokens": Term(total, {"ce": ce.detach(), "kl": kl.detach()})}
