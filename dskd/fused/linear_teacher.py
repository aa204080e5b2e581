"""Whose divergence `linear_kd` takes, checked and as tensors.

Shape letters: N tokens, M of them of one teacher of several, V student columns, W teacher columns,
E hidden size of a teacher, K kept logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.batch import (
    SAME,
    DenseTeacher,
    LinearMixture,
    LinearTeacher,
    LinearTeachers,
    MixedTopK,
    MixtureRule,
    TopKTeacher,
)
from dskd.fused.arguments import (
    LogitMap,
    map_of,
    matrix,
    refuse,
    teacher_columns,
    tensor,
    unit_columns,
)
from dskd.fused.mixed_topk import Kept, mixed_topk, topk_confidence
from dskd.fused.per_token import places_of
from dskd.fused.topk_teacher import at_temperature, check_masses, refuse_many, topk_of

LogitTeacher = (
    LinearTeacher | LinearTeachers | LinearMixture | DenseTeacher | TopKTeacher | MixedTopK | None
)
"""Whose divergence is taken; None: nobody's, cross entropy alone."""


class TeacherForm(NamedTuple):
    """A teacher as :class:`~dskd.fused.logit_loss.LossForm` takes it.

    Attributes:
        form: ``linear``, ``mixed``, ``dense``, ``topk`` or ``label``.
        tensors: of that form.
        narrower: whether it has fewer columns than the student.
        places_N: which tokens its rows are, where they are not in the order of the tokens.
        mixture: of the form ``mixed``: the rule's sharpness and its weights.
        maps: scale and softcap of each of several teachers, none: all have the same, or none.
        map: of all of them.
    """

    form: str
    tensors: list[Tensor]
    narrower: bool = False
    places_N: Tensor | None = None
    mixture: tuple[float, ...] | None = None
    maps: tuple[float, ...] = ()
    map: LogitMap = SAME


def form_of(
    teacher: LogitTeacher,
    logits_NV: Tensor,
    columns: int,
    vocabulary: int | None,
    mode: str,
    temperature: float,
) -> TeacherForm:
    """The form of a teacher; ``columns``: of the student; ``vocabulary``: its real tokens.

    ``logits_NV`` has the tokens, type and device of the student's logits, no columns.
    """
    count = len(logits_NV)
    if teacher is None:
        return TeacherForm("label", [])
    if isinstance(teacher, TopKTeacher):
        return TeacherForm("topk", _topk(teacher, logits_NV, columns, mode, temperature))
    if isinstance(teacher, MixedTopK):
        return TeacherForm("topk", _mixed_topk(teacher, logits_NV, columns, mode, temperature))
    if isinstance(teacher, DenseTeacher):
        matrix("teacher", teacher.logits_NV, rows=count, like=logits_NV)
        shared = teacher_columns(teacher.logits_NV.shape[1], columns, vocabulary)
        tensors = [unit_columns(teacher.logits_NV.detach()[:, :shared])]
        return TeacherForm("dense", tensors, shared < columns)
    if isinstance(teacher, LinearTeacher | LinearTeachers | LinearMixture):
        return _linear(teacher, logits_NV, columns, vocabulary)
    raise TypeError(
        f"teacher: must be a DenseTeacher, LinearTeacher, LinearTeachers, LinearMixture, "
        f"TopKTeacher, MixedTopK or None, not {type(teacher).__name__}"
    )


def check_form(
    form: str, kind: str, mode: str, vocabulary: int | None, teacher_map: LogitMap
) -> None:
    """Refuse what this form of a teacher would leave aside."""
    if form != "topk":
        refuse(mode != "tail", lambda: f"mode: {mode!r} is of a top-k teacher, which this is not")
    if form in ("topk", "label"):
        less = "the teacher's logits are not all there"
        refuse(kind != "forward_kl", lambda: f"kind: {kind} cannot be computed, {less}")
        refuse(vocabulary is not None, lambda: f"vocabulary: nothing to cut, {less}")
        refuse(teacher_map != SAME, lambda: f"teacher_map: nothing to map, {less}")
    if form == "mixed":
        refuse(teacher_map != SAME, lambda: "teacher_map: the teachers of a mixture have their own")


def check_masses_of(
    teacher: LogitTeacher, mode: str, temperature: float, counted_N: Tensor, columns: int
) -> None:
    """Check that what top-k teachers keep, and their tails, can be of one distribution each, where
    one looks; :func:`~dskd.fused.topk_teacher.check_masses` has the last two arguments."""
    if isinstance(teacher, TopKTeacher):
        kept = (teacher.ids_NK, teacher.logprobs_NK, tail_of(teacher, mode, temperature))
        check_masses(*kept, counted_N, temperature=temperature, columns=columns)
    if isinstance(teacher, MixedTopK):
        for k, part in enumerate(teacher.parts):
            for heat in _heats(teacher.rule, temperature):
                with _naming(k):
                    check_masses_of(part, "tail", heat, counted_N, columns)


def tail_of(teacher: TopKTeacher, mode: str, temperature: float) -> Tensor | None:
    """The tail [N] of a top-k teacher in mode ``tail``, None in another."""
    if mode != "tail":
        return None
    stored = teacher.tail_N
    refuse(
        temperature not in stored,
        lambda: (
            f"teacher: has no tail mass at temperature {temperature}, but at "
            f"{', '.join(map(str, stored))}"
        ),
    )
    return stored[temperature]


def autocast(
    owner: str, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor | None]:
    """The operands of a linear layer as autocast would cast them; ``owner`` begins their names."""
    named = (("hidden", hidden), ("weight", weight), ("bias", bias))
    tensors = (hidden, weight, bias)
    for name, value in named if bias is not None else named[:2]:
        tensor(f"{owner}{name}", value)
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def check_head(owner: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the operands of a linear layer; ``owner`` begins their names."""
    matrix(f"{owner}hidden", hidden)
    matrix(f"{owner}weight", weight, like=hidden)
    refuse(
        weight.shape[1] != hidden.shape[1],
        lambda: (
            f"{owner}weight: has {weight.shape[1]} columns, the hidden states {hidden.shape[1]}"
        ),
    )
    refuse(
        weight.dtype != hidden.dtype,
        lambda: f"{owner}weight: is {weight.dtype}, the hidden states are {hidden.dtype}",
    )
    if bias is not None:
        refuse(
            bias.shape != weight.shape[:1] or bias.dtype != weight.dtype,
            lambda: (
                f"{owner}bias: must be {weight.dtype} [{len(weight)}], not {bias.dtype} "
                f"{list(bias.shape)}"
            ),
        )
        refuse(
            bias.device != weight.device,
            lambda: f"{owner}bias: is on {bias.device}, not the weight's",
        )


def _linear(
    teacher: LinearTeacher | LinearTeachers | LinearMixture,
    logits_NV: Tensor,
    columns: int,
    vocabulary: int | None,
) -> TeacherForm:
    """The form of teachers whose logits are made chunk by chunk."""
    count = len(logits_NV)
    if isinstance(teacher, LinearTeacher):
        tensors, shared = _heads([teacher], count, logits_NV, columns, vocabulary)
        return TeacherForm("linear", tensors, shared < columns)
    if isinstance(teacher, LinearMixture):
        check_rule(teacher.rule, len(teacher.parts))
        mixture = (float(teacher.rule.sharpness), *map(float, teacher.rule.weights))
        tensors, shared = _heads(teacher.parts, count, logits_NV, columns, vocabulary)
        maps = _maps(teacher)
        flat = tuple(value for each in maps for value in each) if {*maps} != {SAME} else ()
        return TeacherForm("mixed", tensors, shared < columns, mixture=mixture, maps=flat)
    places_N = places_of(teacher.places_N, logits_NV)
    tensors, shared = _heads(teacher.parts, None, logits_NV, columns, vocabulary)
    rows = sum(len(hidden_ME) for hidden_ME in tensors[::3])
    refuse(rows != count, lambda: f"teachers: have {rows} rows where there are {count} tokens")
    maps = _maps(teacher)
    if len({*maps}) == 1:  # of all logits, so that it costs nothing
        return TeacherForm("linear", tensors, shared < columns, places_N, map=maps[0])
    flat = tuple(value for each in maps for value in each)
    return TeacherForm("linear", tensors, shared < columns, places_N, maps=flat)


def _maps(teacher: LinearTeachers | LinearMixture) -> list[LogitMap]:
    """The map of each of several teachers."""
    if teacher.maps is None:
        return [SAME] * len(teacher.parts)
    refuse(
        len(teacher.maps) != len(teacher.parts),
        lambda: f"maps: {len(teacher.maps)} for {len(teacher.parts)} teachers",
    )
    return [map_of(f"maps[{k}]", each) for k, each in enumerate(teacher.maps)]


def check_rule(rule: MixtureRule, teachers: int) -> None:
    """Check the rule by which so many teachers are mixed."""
    refuse(
        len(rule.weights) != teachers,
        lambda: f"weights: {len(rule.weights)} for {teachers} teachers",
    )
    refuse(
        not all(0 <= weight < math.inf for weight in rule.weights) or not any(rule.weights),
        lambda: f"weights: must be at least 0, finite and not all 0, not {rule.weights}",
    )
    refuse(
        not rule.sharpness >= 0,
        lambda: f"sharpness: must be at least 0 (or infinite), not {rule.sharpness}",
    )


def _heads(
    teachers: Sequence[LinearTeacher],
    rows: int | None,
    logits_NV: Tensor,
    columns: int,
    vocabulary: int | None,
) -> tuple[list[Tensor], int]:
    """Hidden states, weight and bias (empty: none) of each, and the columns that they share.

    ``rows``: of each teacher; None: each has its own number.
    """
    refuse(not teachers, lambda: "teachers: there are none")
    tensors: list[Tensor] = []
    widths = []
    for k, teacher in enumerate(teachers):
        name = f"teachers[{k}]'s " if len(teachers) > 1 else "teacher's "
        hidden_ME, weight_WE, bias_W = autocast(
            name, teacher.hidden_NE, teacher.weight_VE, teacher.bias_V
        )
        check_head(name, hidden_ME, weight_WE, bias_W)
        matrix(f"{name}hidden", hidden_ME, rows=rows, like=logits_NV)
        shared = teacher_columns(len(weight_WE), columns, vocabulary)
        bias_W = weight_WE.new_empty(0) if bias_W is None else bias_W[:shared]
        tensors += [x.detach() for x in (hidden_ME, weight_WE[:shared], bias_W)]
        widths.append(shared)
    refuse(
        len(set(widths)) > 1,
        lambda: (
            f"teachers: have {', '.join(map(str, widths))} columns; if those beyond are padding, "
            f"say how many are real tokens (vocabulary=)"
        ),
    )
    return tensors, widths[0]


def _topk(
    teacher: TopKTeacher, logits_NV: Tensor, columns: int, mode: str, temperature: float
) -> list[Tensor]:
    """Ids, log-probabilities at the temperature, and the tail in mode ``tail``."""
    tail_N = tail_of(teacher, mode, temperature)
    ids_NK, *kept = topk_of(teacher.ids_NK, teacher.logprobs_NK, tail_N, mode, logits_NV, columns)
    found = (ids_NK, *at_temperature(*kept, temperature))
    return [x for x in found if x is not None]


def _mixed_topk(
    teacher: MixedTopK, logits_NV: Tensor, columns: int, mode: str, temperature: float
) -> list[Tensor]:
    """The same of several, mixed; the tail counts in every mode until they are."""
    check_rule(teacher.rule, len(teacher.parts))
    refuse(
        not 0 < teacher.vocabulary <= columns,
        lambda: f"vocabulary: {teacher.vocabulary} is not within the student's {columns} columns",
    )
    found: dict[float, list[Kept]] = {}
    for k, part in enumerate(teacher.parts):
        for heat in _heats(teacher.rule, temperature):
            with _naming(k):
                kept = _topk(part, logits_NV, columns, "tail", heat)
            found.setdefault(heat, []).append(Kept(*kept))
    confidence_Nn = None
    if teacher.rule.sharpness != math.inf:
        sure = [topk_confidence(kept, teacher.vocabulary) for kept in found[1.0]]
        confidence_Nn = torch.stack(sure, 1)
    several = found[temperature]
    ids_NK, logprobs_NK, tail_N = mixed_topk(
        several, confidence_Nn, teacher.rule, teacher.vocabulary
    )
    refuse_many(ids_NK, logits_NV)
    if mode == "tail":
        return [ids_NK, logprobs_NK, tail_N]
    return [ids_NK, logprobs_NK.log_softmax(1)]


def _heats(rule: MixtureRule, temperature: float) -> list[float]:
    """At which temperatures a mixture is asked what its teachers keep."""
    confident = rule.sharpness != math.inf
    return [*dict.fromkeys((temperature, 1.0) if confident else (temperature,))]


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say in a message which teacher of several it is about."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(
            f"teachers[{index}]: {str(problem).removeprefix('teacher: ')}"
        ) from problem
