"""What others offer for the same losses: PyTorch eager and compiled, Liger-Kernel, TRL.

Every peer is a function of inputs that returns the loss, a mean over the tokens, and its gradients.
None of these libraries is needed: what cannot be imported is a row of the table with that error.

- Liger-Kernel (0.8.5): ``pip install --no-deps liger-kernel``; imports torch, triton, packaging.
- TRL (1.16): ``pip install --no-deps trl accelerate``; ``trl.kernels`` imports accelerate,
  transformers, datasets, pandas and jinja2 on its way. Where datasets is missing, it needs dill,
  multiprocess, xxhash and pyarrow besides.

Shape letters: N tokens, V columns, D and E hidden sizes of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """A loss, and its gradients in the order of the inputs."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Head:
    """Inputs of a fused linear loss; the teacher's are None where it is known by its top k."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_NE: Tensor | None
    teacher_VE: Tensor | None
    labels_N: Tensor


Peer = Callable[[], Outcome]
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
"""What Liger and TRL call the divergences."""


def differentiate(loss_of: Callable[..., Tensor], *inputs: Tensor) -> Outcome:
    """The loss and, by autograd, its gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    loss = loss_of(*leaves)
    loss.backward()
    return Outcome(loss.detach(), tuple(leaf.grad for leaf in leaves))


def eager(student_NV: Tensor, teacher_NV: Tensor, kind: str) -> Tensor:
    """The mean divergence as it is usually written, in fp32; logits are let go at once."""
    log_q_NV = F.log_softmax(student_NV.float(), -1)
    del student_NV
    log_p_NV = F.log_softmax(teacher_NV.float(), -1)
    del teacher_NV
    if kind == "forward_kl":
        return _kl_div(log_q_NV, log_p_NV)
    if kind == "reverse_kl":
        return _kl_div(log_p_NV, log_q_NV)
    log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - torch.tensor(2.0).log().item()
    return 0.5 * _kl_div(log_m_NV, log_p_NV) + 0.5 * _kl_div(log_m_NV, log_q_NV)


def _kl_div(log_b_NV: Tensor, log_a_NV: Tensor) -> Tensor:
    return F.kl_div(log_b_NV, log_a_NV, reduction="batchmean", log_target=True)


def closed_form(student_NV: Tensor, teacher_NV: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The mean divergence and its gradient in bf16, without autograd: what is to be compiled."""
    log_q_NV, log_p_NV = (x.float().log_softmax(-1) for x in (student_NV, teacher_NV))
    q_NV, p_NV = log_q_NV.exp(), log_p_NV.exp()
    if kind == "forward_kl":
        loss_N = (p_NV * (log_p_NV - log_q_NV)).sum(-1)
        grad_NV = q_NV - p_NV
    elif kind == "reverse_kl":
        ratio_NV = log_q_NV - log_p_NV
        loss_N = (q_NV * ratio_NV).sum(-1)
        grad_NV = q_NV * (ratio_NV - loss_N[:, None])
    else:
        log_m_NV = (0.5 * (p_NV + q_NV)).log()
        half_NV = 0.5 * (log_q_NV - log_m_NV)
        inner_N = (q_NV * half_NV).sum(-1)
        loss_N = 0.5 * (p_NV * (log_p_NV - log_m_NV)).sum(-1) + inner_N
        grad_NV = q_NV * (half_NV - inner_N[:, None])
    return loss_N.mean(), (grad_NV / len(student_NV)).to(torch.bfloat16)


def dense_peers(
    student_NV: Tensor, teacher_NV: Tensor, kind: str, *, compiled: bool
) -> dict[str, Peer]:
    """Peers of the dense loss."""

    def by_liger() -> Outcome:
        apply = _named("liger_kernel.ops.jsd", "LigerJSDFunction").apply
        log_p_NV = F.log_softmax(teacher_NV.float(), -1)
        return differentiate(
            lambda x: apply(F.log_softmax(x.float(), -1), log_p_NV, None, BETA[kind], -100),
            student_NV,
        )

    peers = logits_peers(student_NV, lambda x: eager(x, teacher_NV, kind), compiled=False)
    peers["Liger jsd"] = by_liger
    if compiled:
        compute = torch.compile(closed_form, dynamic=False)

        def by_compiler() -> Outcome:
            loss, grad_NV = compute(student_NV, teacher_NV, kind)
            return Outcome(loss, (grad_NV,))

        peers["torch compiled"] = by_compiler
    return peers


def logits_peers(
    student_NV: Tensor, loss_of: Callable[[Tensor], Tensor], *, compiled: bool
) -> dict[str, Peer]:
    """Autograd of any mean loss of the student's logits, eager and compiled."""
    peers: dict[str, Peer] = {"torch eager": lambda: differentiate(loss_of, student_NV)}
    if compiled:
        compute = torch.compile(loss_of, dynamic=False)
        peers["torch compiled"] = lambda: differentiate(compute, student_NV)
    return peers


def label_peers(
    student_NV: Tensor, work_NV: Tensor, labels_N: Tensor, *, compiled: bool
) -> dict[str, Peer]:
    """Peers of the cross entropy; Liger's writes the gradient into ``work_NV``, a copy."""

    def by_liger() -> Outcome:
        apply = _named("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction").apply
        arguments = (labels_N, None, -100, 0.0, 0.0, "mean", None, False)
        return differentiate(lambda x: apply(x, *arguments)[0], work_NV)

    found = logits_peers(
        student_NV, lambda x: F.cross_entropy(x.float(), labels_N), compiled=compiled
    )
    return found | {"Liger cross entropy": by_liger}


def linear_peers(head: Head, kind: str) -> dict[str, Peer]:
    """Peers of the fused linear loss that run everywhere, but for Liger's."""

    def by_autograd() -> Outcome:
        return differentiate(
            lambda h, w: eager(F.linear(h, w), F.linear(head.teacher_NE, head.teacher_VE), kind),
            *_student(head),
        )

    def by_trl() -> Outcome:
        apply = _named("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction").apply
        teacher = (head.teacher_NE, head.teacher_VE, None)
        return differentiate(
            lambda h, w: apply(h, w, None, *teacher, BETA[kind])[0].mean(), *_student(head)
        )

    return {"torch eager": by_autograd, "TRL chunked": by_trl}


def liger_chunked(head: Head, kind: str, *, chunk: int, compiled: bool) -> dict[str, Peer]:
    """Liger's chunked distillation loss, ``chunk`` tokens at a time (1024 is their default)."""

    def by_liger() -> Outcome:
        make = _named("liger_kernel.chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss")
        weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": BETA[kind]}
        loss = make(**weights, compiled=compiled, chunk_size=chunk)
        teacher = (head.teacher_NE, head.teacher_VE, head.labels_N)
        return differentiate(lambda h, w: loss(h, w, *teacher), *_student(head))

    return {f"Liger chunked ({chunk}){', compiled' if compiled else ''}": by_liger}


def fused_peers(head: Head, kind: str, *, compiled: bool) -> dict[str, Peer]:
    """Peers of the fused linear loss that run on a GPU alone."""

    def by_liger() -> Outcome:
        apply = _named("liger_kernel.ops.fused_linear_jsd", "LigerFusedLinearJSDFunction").apply
        return differentiate(
            lambda h, w: apply(h, w, head.teacher_NE, head.teacher_VE, None, BETA[kind]),
            *_student(head),
        )

    peers: dict[str, Peer] = {"Liger fused": by_liger}
    if compiled:
        compute = torch.compile(closed_form, dynamic=False)

        def by_compiler() -> Outcome:
            student_NV = F.linear(head.hidden_ND, head.weight_VD)
            loss, grad_NV = compute(student_NV, F.linear(head.teacher_NE, head.teacher_VE), kind)
            return Outcome(loss, (grad_NV @ head.weight_VD, grad_NV.t() @ head.hidden_ND))

        peers["torch compiled"] = by_compiler
    return peers


def _student(head: Head) -> tuple[Tensor, Tensor]:
    return head.hidden_ND, head.weight_VD


def _named(module: str, name: str) -> Any:
    """Something of a library that may be absent (ImportError)."""
    return getattr(import_module(module), name)
