"""Every operation that has kernels, under its public name: Triton on a GPU, plain torch elsewhere.

``merge_layers``, ``unmerge_layers`` and ``update`` serve compactors (``dskd/fused/compactor.py``,
``update.py``). All else is a loss, which takes weights per token (or one number) for the divergence
and the label's cross entropy, into which the caller folds whatever its method needs: mask, rate,
T^2, re-weighting. It returns :class:`Losses`, whose ``total`` is a weighted SUM with a gradient,
computed together with the loss; nothing is divided by a count here. Tokens lie along one axis,
logits [N, V] and labels [N], or several, [B, T, V] and [B, T], and so do the losses of each.

The same in plain differentiable torch, for any dtype, is in ``dskd/fused/reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dskd.batch import (
    DenseTeacher,
    LinearMixture,
    LinearTeacher,
    LinearTeachers,
    MixedTeachers,
    MixedTopK,
    MixtureRule,
    Positions,
    ProjectedTeacher,
    ProjectedTeachers,
    Signal,
    TopKTeacher,
    logit_map,
)
from dskd.errors import ConfigError
from dskd.fused.arguments import INFINITE, KINDS, MODES, LogitMap, Losses, TokenWeight, TopKMode
from dskd.fused.backend import implementation, triton_everywhere
from dskd.fused.compactor import FactorGradients, Factors, Merged, merge_layers, unmerge_layers
from dskd.fused.dense import dense_kd
from dskd.fused.label import label_ce
from dskd.fused.linear import linear_kd
from dskd.fused.linear_teacher import LogitTeacher
from dskd.fused.mixture import mixture_kd
from dskd.fused.topk import topk_kd
from dskd.fused.topk_teacher import topk_teacher
from dskd.fused.update import Piece, update
from dskd.fused.vocab_parallel import vocab_parallel_kd

__all__ = [
    "KINDS",
    "MODES",
    "DenseTeacher",
    "FactorGradients",
    "Factors",
    "LinearMixture",
    "LinearTeacher",
    "LinearTeachers",
    "LogitMap",
    "Losses",
    "Merged",
    "MixedTopK",
    "MixtureRule",
    "Piece",
    "TopKTeacher",
    "dense_kd",
    "implementation",
    "label_ce",
    "linear_kd",
    "merge_layers",
    "mixture_kd",
    "positions_ce",
    "positions_kd",
    "topk_kd",
    "topk_teacher",
    "triton_everywhere",
    "unmerge_layers",
    "update",
    "vocab_parallel_kd",
]


def positions_ce(positions: Positions, label_weight: TokenWeight = 1.0) -> Losses:
    """Cross entropy of a student's supervised positions, through its head."""
    return _through_head(positions, None, label_weight=label_weight)


def positions_kd(
    positions: Positions,
    signal: Signal,
    *,
    temperature: float,
    kind: str = "forward_kl",
    beta: float = 0.5,
    mode: TopKMode = "tail",
    weight: TokenWeight = 1.0,
    reverse_weight: TokenWeight | None = None,
    label_weight: TokenWeight = 0.0,
) -> Losses:
    """:func:`linear_kd` of a student's supervised positions against whatever teaches them.

    It runs inside the forward of the heads of student and teachers, where ZeRO-3 has gathered their
    weights.

    Args:
        positions: the student's.
        signal: its teacher's at the same positions.
        kind, beta, reverse_weight: of a teacher with full logits. Kinds that are infinite where the
            teacher lacks a column (reverse KL, mixed) are of the shared vocabulary: what columns
            the student has beyond, of padding, are left out of its softmax, the label's too.
        mode: of top-k teachers, whose divergence is the forward KL.

    The other arguments are those of :func:`~dskd.fused.linear.linear_kd`.

    Raises:
        ConfigError: a top-k teacher cannot give this kind of divergence.
        ValueError: it has no tail mass at this temperature.
    """
    options = {"temperature": temperature, "weight": weight, "label_weight": label_weight}
    if isinstance(signal, TopKTeacher | MixedTopK):
        if kind != "forward_kl":
            raise ConfigError(
                f"teacher: a cached teacher knows its largest logits only, and this method's "
                f"divergence, {kind}, needs them all: use a live teacher"
            )
        return _through_head(positions, signal, mode=mode, **options)
    options |= {"kind": kind, "beta": beta, "reverse_weight": reverse_weight}
    if isinstance(signal, DenseTeacher):
        shared = signal.logits_NV.shape[1] if kind in INFINITE else None
        return _through_head(positions, signal, shared, **options)
    if isinstance(signal, ProjectedTeachers):
        maps = [logit_map(part.projection) for part in signal.parts]
        of_heads = partial(LinearTeachers, places_N=signal.places_N, maps=maps)
        return _through_heads(positions, signal.parts, of_heads, options)
    if isinstance(signal, MixedTeachers):
        maps = [logit_map(part.projection) for part in signal.parts]
        of_heads = partial(LinearMixture, rule=signal.rule, maps=maps)
        return _through_heads(positions, signal.parts, of_heads, options)
    options["teacher_map"] = logit_map(signal.projection)
    return _through_heads(positions, [signal], lambda heads: heads[0], options)


def _through_head(
    positions: Positions, teacher: LogitTeacher, shared: int | None = None, **options: object
) -> Losses:
    """``shared``: how many columns of the student's head count; None: all."""

    def use(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, ...]:
        labels_N = positions.labels_N
        if shared is not None and shared < len(weight_VD):
            weight_VD, bias_V = weight_VD[:shared], None if bias_V is None else bias_V[:shared]
        how = {"labels_N": labels_N, "student_map": logit_map(positions.projection), **options}
        return tuple(linear_kd(hidden_ND, weight_VD, bias_V, teacher=teacher, **how))

    return Losses(*positions.projection(positions.hidden_ND, use))


def _through_heads(
    positions: Positions,
    parts: Sequence[ProjectedTeacher],
    teacher_of: Callable[[list[LinearTeacher]], LogitTeacher],
    options: dict[str, object],
) -> Losses:
    """Through the heads of all parts, one within the other: all weights are there at once."""
    (vocabulary,) = {part.vocabulary for part in parts}
    shared = vocabulary if options["kind"] in INFINITE else None
    with_gradient = torch.is_grad_enabled()
    heads: list[LinearTeacher] = []
    found: list[Losses] = []

    def enter(rest: Sequence[ProjectedTeacher]) -> None:
        if rest:
            rest[0].projection(rest[0].hidden_NE, partial(use, rest[1:]))
            return
        with torch.set_grad_enabled(with_gradient):
            teacher = teacher_of(heads)
            found.append(
                _through_head(positions, teacher, shared, vocabulary=vocabulary, **options)
            )

    def use(
        rest: Sequence[ProjectedTeacher],
        hidden_NE: Tensor,
        weight_WE: Tensor,
        bias_W: Tensor | None,
    ) -> Tensor:
        heads.append(LinearTeacher(hidden_NE, weight_WE, bias_W))
        enter(rest)
        return hidden_NE

    # The result leaves by the side: as a module's output it would take the hooks of a teacher's
    # engine into the student's backward pass.
    with torch.no_grad():
        enter(parts)
    return found[0]
