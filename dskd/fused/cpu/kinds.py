"""Each divergence of a chunk of student logits from teacher logits, and gradient, in closed form.

In the formulas s and t are the chunks of the student's and the teacher's logits, a and b the
factors that make them logits over the temperature, ``es = exp(a s)`` and ``et = exp(b t)`` with
sums zs and zt, so that q = es / zs and p = et / zt (0 beyond the teacher's columns).

Each kind returns its divergence [C, 1] and its gradient by ``a s`` as a sum of matrices times one
number a row; the first matrix is es. A logarithm of p or q is never taken: ``b t`` and ``a s`` are
it but for a number of the row, and the mean m of p and q is formed times zs, which spares q that.

Shape letters: C rows, V student columns, W teacher columns (W <= V).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dskd.fused.cpu.chunks import MASKED, ChunkRows, GradientTerm, Logits, exponentials

LossAndTerms = tuple[Tensor, list[GradientTerm]]


class Pair:
    """A chunk of both sides: logits, exponentials and their sums, two buffers [C, V] to use."""

    def __init__(
        self,
        student: Logits,
        teacher: Logits,
        rows: ChunkRows,
        shifted: bool,
        buffers: list[Tensor],
    ) -> None:
        self.es, et, self.x, self.y = buffers
        self.s, self.t = student.read(rows, shifted), teacher.read(rows, shifted)
        self._width, self._shifted = self.t.shape[1], shifted
        self.et = self.narrow(et)
        self.a, self.b = student.over, teacher.over
        self.zs = exponentials(self.s, self.a, shifted, self.es)
        self.zt = exponentials(self.t, self.b, shifted, self.et)

    def narrow(self, matrix_CV: Tensor) -> Tensor:
        """The teacher's columns of a matrix."""
        return matrix_CV[:, : self._width]

    def gap(self) -> Tensor:
        """``t - (a / b) s`` [C, W] in buffer x: ``b gap = log(et / es)``."""
        out = self.narrow(self.x)
        return torch.add(self.t, self.narrow(self.s), alpha=-self.a / self.b, out=out)

    def mean(self, of_p: float, of_q: float) -> Tensor:
        """``(of_p p + of_q q) zs`` [C, V] in buffer x, nowhere 0."""
        mean_CV = torch.mul(self.es, of_q, out=self.x)
        self.narrow(mean_CV).addcmul_(self.et, self.zs * of_p / self.zt)
        return mean_CV.clamp_(min=torch.finfo(mean_CV.dtype).tiny)

    def from_p(self, log_CV: Tensor) -> Tensor:
        """KL(p || m) [C, 1] of ``log(m zs)``, in buffer y."""
        ratio_CW = self.narrow(self.y)
        torch.add(self.narrow(log_CV), self.t, alpha=-self.b, out=ratio_CW)
        return (self.zs / self.zt).log() - row_sum(ratio_CW.mul_(self.et)) / self.zt

    def lost(self, loss_C1: Tensor, mass: Tensor, other: Tensor) -> Tensor:
        """The loss, ``inf`` where one side's mass is on a masked logit of the other side."""
        if not self._shifted:
            return loss_C1
        on_masked = (self.narrow(mass) > 0) & (self.narrow(other) < MASKED)
        return loss_C1.masked_fill(on_masked.any(1, keepdim=True), torch.inf)


def row_sum(matrix: Tensor) -> Tensor:
    """The sum of each row, [C, 1]."""
    return matrix.sum(1, keepdim=True)


def _forward_kl(pair: Pair, _beta: float) -> LossAndTerms:
    """``sum p b gap + log(zs / zt)``; its gradient is q - p."""
    cross_C1 = row_sum(pair.gap().mul_(pair.et)) * pair.b / pair.zt
    loss_C1 = cross_C1 + (pair.zs / pair.zt).log()
    terms = [(pair.es, 1.0 / pair.zs), (pair.et, -1.0 / pair.zt)]
    return pair.lost(loss_C1, pair.et, pair.s), terms


def _reverse_kl(pair: Pair, _beta: float) -> LossAndTerms:
    """``log(zt / zs) - sum q b gap``; its gradient is ``q (sum q b gap - b gap)``."""
    product_CW = pair.gap().mul_(pair.narrow(pair.es))
    cross_C1 = row_sum(product_CW) * pair.b / pair.zs
    loss_C1 = (pair.zt / pair.zs).log() - cross_C1
    terms = [(pair.es, cross_C1 / pair.zs), (product_CW, -pair.b / pair.zs)]
    return pair.lost(loss_C1, pair.es, pair.t), terms


def mixed(pair: Pair, weight_C1: Tensor, reverse_C1: Tensor) -> LossAndTerms:
    """``weight KL(p || q) + reverse KL(q || p)`` and its gradient, weights included."""
    forward_C1, ((es_CV, of_es_C1), (et_CW, of_et_C1)) = _forward_kl(pair, 0.0)
    backward_C1, ((_, more_C1), (product_CW, of_product_C1)) = _reverse_kl(pair, 0.0)
    # a weight of 0 counts for more than an infinite divergence
    forward_C1 = torch.where(weight_C1 == 0, 0.0, weight_C1 * forward_C1)
    backward_C1 = torch.where(reverse_C1 == 0, 0.0, reverse_C1 * backward_C1)
    return forward_C1 + backward_C1, [
        (es_CV, weight_C1 * of_es_C1 + reverse_C1 * more_C1),
        (et_CW, weight_C1 * of_et_C1),
        (product_CW, reverse_C1 * of_product_C1),
    ]


def _jsd(pair: Pair, beta: float) -> LossAndTerms:
    """``beta KL(p || m) - (1 - beta) sum q r`` with r = log(m / q).

    Its gradient is ``(1 - beta) q (sum q r - r)``.
    """
    log_CV = pair.mean(beta, 1.0 - beta).log_()
    from_p_C1 = pair.from_p(log_CV)
    product_CV = log_CV.add_(pair.s, alpha=-pair.a).mul_(pair.es)
    cross_C1 = row_sum(product_CV) / pair.zs
    scale_C1 = (1.0 - beta) / pair.zs
    loss_C1 = beta * from_p_C1 - (1.0 - beta) * cross_C1
    return loss_C1, [(pair.es, scale_C1 * cross_C1), (product_CV, -scale_C1)]


def _skew_forward_kl(pair: Pair, beta: float) -> LossAndTerms:
    """KL(p || m); with x = p q / m its gradient is ``(1 - beta) (q sum x - x)``."""
    mean_CV = pair.mean(beta, 1.0 - beta)
    loss_C1 = pair.from_p(torch.log(mean_CV, out=pair.y))
    product_CW = pair.narrow(mean_CV)
    torch.div(pair.et, product_CW, out=product_CW).mul_(pair.narrow(pair.es))
    scale_C1 = (1.0 - beta) / pair.zt
    terms = [(pair.es, scale_C1 * row_sum(product_CW) / pair.zs), (product_CW, -scale_C1)]
    return loss_C1, terms


def _skew_reverse_kl(pair: Pair, beta: float) -> LossAndTerms:
    """``-sum q r`` with r = log(m / q); with h = r + beta q / m, ``q (sum q h - h)``."""
    mean_CV, product_CV = pair.mean(1.0 - beta, beta), pair.y
    torch.div(pair.es, mean_CV, out=product_CV)
    ratio_CV = mean_CV.log_().add_(pair.s, alpha=-pair.a)
    torch.add(ratio_CV, product_CV, alpha=beta, out=product_CV).mul_(pair.es)
    loss_C1 = -row_sum(ratio_CV.mul_(pair.es)) / pair.zs
    cross_C1 = row_sum(product_CV) / pair.zs
    return loss_C1, [(pair.es, cross_C1 / pair.zs), (product_CV, -1.0 / pair.zs)]


def _total_variation(pair: Pair, _beta: float) -> LossAndTerms:
    """``sum |q - p| / 2``; with h the sign of q - p, ``q (h - sum q h) / 2``."""
    gap_CV = torch.mul(pair.es, 1.0 / pair.zs, out=pair.x)
    # subtracted as rounded, not in one step: equal probabilities must give exactly 0
    pair.narrow(gap_CV).sub_(torch.mul(pair.et, 1.0 / pair.zt, out=pair.narrow(pair.y)))
    loss_C1 = row_sum(torch.abs(gap_CV, out=pair.y)) / 2.0
    product_CV = gap_CV.sign_().mul_(pair.es)
    cross_C1 = row_sum(product_CV) / pair.zs
    return loss_C1, [(pair.es, -cross_C1 / (2.0 * pair.zs)), (product_CV, 0.5 / pair.zs)]


CLOSED_FORMS: dict[str, Callable[[Pair, float], LossAndTerms]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}
"""All but :func:`mixed`, by name: of a pair and beta."""
