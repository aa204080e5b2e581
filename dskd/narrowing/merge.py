"""A student with compactors as a dense HuggingFace model, and the proof that it is the same one.

For a linear map from group ``in`` to group ``out``, with the kept units' indices i and o,

    W_small = CR[o, :] W CL[:, i],   b_small = (CR b)[o],

for embeddings E CR[o, :]^T, for the vocabulary projection W CL[:, i]; norms' weights are selected.
Nothing is rescaled but the queries (``narrow.py``) and the weights of UER's norms. It is the
student's function exactly where removed units' compactor entries are 0, and :func:`check_exact`
measures how far it is from that.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dskd import ops
from dskd.batch import Batch
from dskd.engine.zero import gathered
from dskd.errors import DskdError
from dskd.models.build import construct
from dskd.models.families import tie_head_bias
from dskd.narrowing.compactors import MergedLayer
from dskd.narrowing.insert import Keep, Surgery, kept_widths, replica
from dskd.narrowing.layouts import Map, kept_entries, layout_of, norms_of
from dskd.narrowing.masked_norm import biased_scale
from dskd.narrowing.narrow import narrow, narrowed_config
from dskd.narrowing.units import Whole, spread
from dskd.system import dist

TOLERANCE = 1e-5
"""Most that logits may differ, as a share of the largest one (or of 1, if that is larger)."""

GAP = 0.1
"""Most that logits may differ from those of a student whose removed units only came near zero: no
token's loss then changes by more than 0.2. All removed entries at the size of the original's bursts
at once (``rules.NEAR_ZERO``) make a difference of 0.006 in a random BERT of 12 x 768.
"""


def merged_student(surgery: Surgery, keep: Keep, whole: Whole | None = None) -> PreTrainedModel:
    """The dense model of the kept units. Products are in float64.

    Args:
        keep: which units stay.
        whole: values of the student's parameters by name, one at a time, in the dtype wanted; by
            default what the student itself computes with. Collective if they are sharded.

    Raises:
        DskdError: the kept units are not those of a model of the family.
    """
    small = narrow(_Compacted(surgery, whole), keep)
    if surgery.statistics == "unbiased":
        with torch.no_grad():
            for path, _ in norms_of(small.config):
                weight = small.get_submodule(path).weight
                weight.mul_(biased_scale(len(weight)))
    return small


class _Compacted:
    """A student's weights times their compactors."""

    def __init__(self, surgery: Surgery, whole: Whole | None) -> None:
        self.model = surgery.model
        self._layout = layout_of(self.model.config)
        self._whole = whole or self._own
        # A tied parameter has several names, of which ``whole`` knows one.
        self._names = {id(p): name for name, p in self.model.named_parameters()}

    def table(self, path: str, keep_R: Tensor) -> Tensor:
        return self._chained(f"{self._layout.moved(path)}.weight", self._embedded, keep_R)

    def projection(self, path: str, keep_in: Tensor) -> Tensor:
        return self._chained(f"{path}.weight", f"{path}.left", keep_in)

    def map(self, own: Map, keep_in: Tensor, keep_out: Tensor) -> tuple[Tensor, Tensor | None]:
        layer = self.model.get_submodule(own.path)
        assert isinstance(layer, MergedLayer)
        values = {n: self._value(f"{own.path}.{n}") for n, _ in layer.named_parameters()}
        dtype, device = values["weight"].dtype, values["weight"].device
        shadow = copy.copy(layer)  # the layer's own view of parts, over other values
        wide = {n: nn.Parameter(v.double(), requires_grad=False) for n, v in values.items()}
        shadow._parameters = {n: wide.get(n) for n in layer._parameters}
        factors = shadow.factors()
        inputs = kept_entries(keep_in, factors.left_PKK.shape[-1]).to(device)
        outputs = kept_entries(keep_out, factors.right_PNN.shape[-1]).to(device)
        (merged,) = ops.merge_layers([factors._replace(keep_in=inputs, keep_out=outputs)])
        bias = merged.bias_Pn
        return merged.weight_Pnk.to(dtype), None if bias is None else bias.to(dtype)

    def whole(self, name: str) -> Tensor:
        path, _, own = name.rpartition(".")
        return self._value(f"{self._layout.moved(path)}.{own}")

    @property
    def _embedded(self) -> str:
        return f"{self._layout.embedded}.right"

    def _chained(self, weight: str, compactor: str, keep_K: Tensor) -> Tensor:
        """W (I + DL)[:, i], which for an embedding is E (I + DR)[i, :]^T: [V, k]."""
        weight_VK, difference_KK = self._value(weight), self._value(compactor)
        if compactor == self._embedded:
            difference_KK = difference_KK.mT
        kept = kept_entries(keep_K, weight_VK.shape[1]).to(weight_VK.device)
        wide_VK = weight_VK.double()
        return (wide_VK[:, kept] + wide_VK @ difference_KK[:, kept].double()).to(weight_VK.dtype)

    def _value(self, name: str) -> Tensor:
        return self._whole(self._names[id(self.model.get_parameter(name))])

    def _own(self, name: str) -> Tensor:
        parameter = self.model.get_parameter(name)
        with gathered([parameter]):
            return parameter.detach().clone()


class Exactness(NamedTuple):
    """How far three forms of a student are from each other.

    Attributes:
        soft: largest difference of logits between the student as it is and the merged one.
        hard: the same with removed units' compactor entries set to 0, and UER's norms as they are
            exported: HuggingFace's, which differ by their eps.
        removed: largest norm of a removed unit in a compactor.
        where: that compactor's name.
    """

    soft: float
    hard: float
    removed: float
    where: str


def checked_merge(
    surgery: Surgery, keep: Keep, whole: Whole, batch: Batch, *, soft: bool = True
) -> tuple[PreTrainedModel, Exactness]:
    """Merge a student on rank 0's CPU, refuse it if it is another, and round it to its own dtype.

    Args:
        whole: the fp32 masters by name, the same calls on every rank (collective).
        batch: what logits are compared on, on the CPU.
        soft: see :func:`check_exact`.

    Returns:
        The model, without values (on ``meta``) on the other ranks; and how exact it is.

    Raises:
        DskdError: as :func:`merged_student` and :func:`check_exact` do; on every rank.
    """
    first = dist.rank() == 0
    values: dict[str, Tensor] = {}
    for name, _ in surgery.model.named_parameters():
        value = whole(name)
        if first:
            values[name] = value.cpu()
    merged: list[PreTrainedModel] = []  # not the result of rank 0's work, which would be sent

    def work() -> Exactness:
        merged.append(merged_student(surgery, keep, values.__getitem__))
        merged[0].set_attn_implementation("eager")  # flash attention is not for CPUs
        twin = replica(surgery, values.__getitem__)
        return check_exact(twin, merged[0], keep, batch, soft=soft)

    found = dist.on_rank0(work)
    if not first:
        merged.append(_outline(surgery, keep))
    return merged[0].to(next(surgery.model.parameters()).dtype), found


def _outline(surgery: Surgery, keep: Keep) -> PreTrainedModel:
    """What :func:`merged_student` makes, without values."""
    config = surgery.model.config
    small = narrowed_config(config, kept_widths(config, keep))
    with torch.device("meta"):
        model = construct(small, "eager", None, torch.float32, "the student's config")
    tie_head_bias(model)
    return model


@torch.no_grad()
def check_exact(
    student: Surgery, merged: PreTrainedModel, keep: Keep, batch: Batch, *, soft: bool = True
) -> Exactness:
    """Refuse a merged model that is not the student.

    Args:
        student: of fp32 values, unsharded (``insert.replica``); its removed entries are set to 0.
        merged: what :func:`merged_student` made of it, in fp32.
        batch: what logits are compared on; padding does not count.
        soft: whether the student as it is must agree to ``TOLERANCE`` too, not only with removed
            entries at 0; else it must to ``GAP``.

    Raises:
        DskdError: logits differ by more, or are not finite; tells the largest norm of a removed
            unit.
    """
    removed, where = largest_removed(student, keep)
    student.mask(keep)
    student.merging.forget()
    merged_logits = _logits(merged, batch)
    as_is = _logits(student.model, batch) - merged_logits
    zero_removed(student, keep)
    if student.statistics == "unbiased":
        _plain_norms(student, keep)
    hard = _logits(student.model, batch) - merged_logits
    found = Exactness(float(as_is.abs().max()), float(hard.abs().max()), removed, where)
    largest = float(merged_logits.abs().max())
    bound = TOLERANCE * max(1.0, largest)
    finite = all(map(math.isfinite, (largest, found.hard, found.soft)))
    if not finite or found.hard > bound or (soft and found.soft > bound):
        raise DskdError(
            "export: the merged model is not the trained one. Its logits, up to "
            f"{largest:.3g}, are {found.soft:.2g} from the student's, and {found.hard:.2g} from "
            f"the student's with removed units at 0. The largest norm of a removed unit is "
            f"{removed:.2g}, in {where}; train until it is 0"
        )
    if not soft and found.soft > GAP:
        raise DskdError(
            f"export: without its removed units the student is another: logits change by up to "
            f"{found.soft:.2g}, {GAP} at most is near enough. The largest norm of a removed unit "
            f"is {removed:.2g}, in {where}. Removed units need longer to go to 0, or a stronger "
            f"pull: raise train.steps, method.penalty or method.lr, or lower method.every; or take "
            f"method.rule annealed, which makes them exactly 0"
        )
    return found


def _plain_norms(student: Surgery, keep: Keep) -> None:
    for name, group in student.groups.items():
        for path in group.norms:
            norm = student.model.get_submodule(path)
            norm.become_biased(int(spread(keep[name], len(norm.weight)).sum()))
    student.statistics = "biased"


def largest_removed(student: Surgery, keep: Keep) -> tuple[float, str]:
    """Largest norm of a removed unit's column (left) or row (right) in a compactor, and where."""
    found = [(0.0, "none")]
    for name, group in student.groups.items():
        for member in group.members:
            compactor = student.model.get_parameter(member.name).detach().double()
            compactor = compactor + torch.eye(compactor.shape[-1], device=compactor.device)
            norms = torch.linalg.vector_norm(compactor, dim=-2 if member.side == "left" else -1)
            gone = ~spread(keep[name], norms.shape[-1]).to(norms.device)
            if gone.any():
                found.append((float(norms[..., gone].max()), member.name))
    return max(found, key=lambda pair: pair[0])


@torch.no_grad()
def zero_removed(student: Surgery, keep: Keep) -> None:
    """Set the removed units' columns (left) and rows (right) of every compactor to 0."""
    for name, group in student.groups.items():
        for member in group.members:
            difference = student.model.get_parameter(member.name)
            size = difference.shape[-1]
            gone = (~spread(keep[name], size)).nonzero().flatten().to(difference.device)
            if member.side == "left":
                difference[..., :, gone] = 0
            else:
                difference[..., gone, :] = 0
            difference[..., gone, gone] = -1
    student.merging.forget()


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[real tokens, V] in eval mode."""
    training = model.training
    model.eval()
    options = {"use_cache": False} if model.can_generate() else {}
    out = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **options)
    model.train(training)
    return out.logits[batch.mask_BT.bool()]
