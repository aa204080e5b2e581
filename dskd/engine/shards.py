"""What this rank holds of each parameter: fp32 master, gradient and moments, editable in place.

A method that changes its student between the backward pass and the optimiser's step, or after it,
sees the same thing at every ZeRO stage: a flat piece of the parameter. Whole tensors at ZeRO-0, the
part of the rank's flat partition at ZeRO-1 and 2, an even slice at ZeRO-3. The pieces are
DeepSpeed's own memory: an edit before the step is what the step sees, an edit of a weight after it
is what the model computes with once it is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from dskd.errors import ConfigError
from dskd.system import dist

MOMENTS = ("exp_avg", "exp_avg_sq")

_BUCKET = 1 << 25
"""Entries of parameters put together at once, after which a bucket is closed."""


@dataclass(frozen=True)
class Shard:
    """This rank's piece of one parameter; every tensor is flat, [piece], and may be edited.

    Attributes:
        name: the parameter's name in the student.
        shape: of the whole parameter.
        start: where the piece begins in the flattened parameter.
        weight: fp32 (the parameter's dtype in a plain float64 model).
        gradient: of the whole effective batch, before clipping, in the dtype that DeepSpeed sums
            in (16 bits unless ``data_types.grad_accum_dtype`` says fp32) and times fp16's loss
            scale; None after the step, or where the parameter has none.
        moments: Adam's ``exp_avg`` and ``exp_avg_sq``; empty before the first step.
    """

    name: str
    shape: torch.Size
    start: int
    weight: Tensor
    gradient: Tensor | None
    moments: Mapping[str, Tensor]


class ParameterShards:
    """The pieces of all parameters: here those of plain torch, or of ZeRO-0 in fp32.

    Args:
        parameters: by name, those that are trained.
        optimizer: torch's own, whose state belongs to what it steps.
        gradients: whether the gradients are those of a step still to be taken.
    """

    spread = False
    """Whether each entry lies on one rank alone, as under ZeRO; else every rank holds all."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Any, *, gradients: bool
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._gradients = gradients

    @property
    def device(self) -> torch.device:
        """Where the model computes, the same kind on every rank; the pieces may lie elsewhere."""
        return next(iter(self._parameters.values())).device

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: ``lr``, ``eps`` ... as the next step will use them."""
        return self._optimizer.param_groups

    def shards(self) -> Iterator[Shard]:
        """The pieces that this rank holds, in the parameters' order; none is empty."""
        for name in self._parameters:
            found = self.shard(name)
            if found is not None:
                yield found

    def shard(self, name: str) -> Shard | None:
        """This rank's piece of a parameter, if it holds any of it."""
        parameter = self._parameters[name]
        weight, gradient = parameter.detach(), parameter.grad
        return self._piece(name, parameter.shape, 0, weight, gradient, parameter)

    def whole(self, name: str) -> Tensor:
        """The whole fp32 weight, on every rank, not to be changed (collective under ZeRO)."""
        return self._parameters[name].detach()

    def wholes(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Each name with its :meth:`whole` weight; fewer collectives than one a parameter where
        that is simple."""
        for name in names:
            yield name, self.whole(name)

    def publish(self) -> None:
        """Make the model compute with the weights as edited (collective under ZeRO)."""

    def _piece(
        self,
        name: str,
        shape: torch.Size,
        start: int,
        weight: Tensor,
        gradient: Tensor | None,
        stepped: Tensor,
        held: int = 0,
    ) -> Shard:
        """``stepped``: what the optimizer steps, in which the piece begins at ``held``."""
        flat = weight.view(-1)
        state = self._optimizer.state.get(stepped, {})
        pieces = {key: state[key].view(-1) for key in MOMENTS if key in state}
        moments = {key: value.narrow(0, held, len(flat)) for key, value in pieces.items()}
        if not self._gradients:
            gradient = None
        gradient = None if gradient is None else gradient.detach().view(-1)
        return Shard(name, shape, start, flat, gradient, moments)


class CopiedShards(ParameterShards):
    """ZeRO-0 in 16 bits: DeepSpeed keeps an fp32 copy of each parameter and steps that."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Any, *, gradients: bool
    ) -> None:
        super().__init__(parameters, optimizer.optimizer, gradients=gradients)
        low = [parameter for group in optimizer.fp16_groups for parameter in group]
        full = [master for group in optimizer.fp32_groups for master in group]
        masters = {id(parameter): master for parameter, master in zip(low, full, strict=True)}
        self._masters = {name: masters[id(parameter)] for name, parameter in parameters.items()}

    def shard(self, name: str) -> Shard | None:
        """The whole parameter: the copy's weight and moments, the parameter's own gradient."""
        gradient, master = self._parameters[name].grad, self._masters[name]
        return self._piece(name, master.shape, 0, master.detach(), gradient, master)

    def whole(self, name: str) -> Tensor:
        """The fp32 copy."""
        return self._masters[name].detach()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies into the parameters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._masters[name])


class _Place(NamedTuple):
    """Where a piece is: its group, first entry in the flat partition and parameter, and size."""

    group: int
    held: int
    start: int
    size: int


class PartitionShards(ParameterShards):
    """ZeRO-1 and 2: the rank's partition of each group is one flat tensor, cut anywhere.

    Places are counted here: DeepSpeed's own mapping of parameters to their pieces leaves out that
    ``round_robin_gradients`` changes their order, and learns of the first group's moments only.
    """

    spread = True

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Any, *, gradients: bool
    ) -> None:
        super().__init__(parameters, optimizer.optimizer, gradients=gradients)
        self._zero = optimizer
        self._places: dict[int, _Place] = {}
        self._held: dict[tuple[int, int], Tensor] = {}
        ordered = zip(
            optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
        )
        for group, (members, offsets) in enumerate(ordered):
            size = optimizer.partition_size[group]
            begin = size * dist.rank()
            for parameter, offset in zip(members, offsets, strict=True):
                first = max(offset, begin)
                count = min(offset + parameter.numel(), begin + size) - first
                if count > 0:
                    place = _Place(group, first - begin, first - offset, count)
                    self._places[id(parameter)] = place
            if gradients and not optimizer.cpu_offload:
                position = 0
                for gradient in optimizer.averaged_gradients[group]:
                    self._held[group, position] = gradient
                    position += gradient.numel()

    def shard(self, name: str) -> Shard | None:
        """The part of the parameter that lies in the rank's partition."""
        parameter = self._parameters[name]
        place = self._places.get(id(parameter))
        if place is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[place.group]
        gradient = None
        if self._gradients and self._zero.cpu_offload:
            gradient = flat.grad.narrow(0, place.held, place.size)
        elif self._gradients:
            gradient = self._held[place.group, place.held]
        weight, shape = flat.detach().narrow(0, place.held, place.size), parameter.shape
        return self._piece(name, shape, place.start, weight, gradient, flat, place.held)

    def whole(self, name: str) -> Tensor:
        """The weight put together from the ranks' partitions."""
        return dict(self.wholes([name]))[name]

    def wholes(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """One collective for each bucket of parameters."""
        bucket: dict[str, nn.Parameter] = {}
        for name in names:
            bucket[name] = self._parameters[name]
            if sum(parameter.numel() for parameter in bucket.values()) >= _BUCKET:
                yield from self._together(bucket)
                bucket = {}
        if bucket:
            yield from self._together(bucket)

    def _together(self, bucket: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        sizes = [parameter.numel() for parameter in bucket.values()]
        device = next(iter(bucket.values())).device
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        wholes = dict(zip(bucket, flat.split(sizes), strict=True))
        for name, whole in wholes.items():
            if (shard := self.shard(name)) is not None:
                whole[shard.start : shard.start + len(shard.weight)] = shard.weight
        dist.sum_over_ranks(flat)
        for name, whole in wholes.items():
            yield name, whole.view(bucket[name].shape)

    def publish(self) -> None:
        """Round the partitions into the parameters and gather them, as a step does."""
        self._zero.update_lp_params()


class SliceShards(ParameterShards):
    """ZeRO-3: every parameter is cut into one even slice per rank, the last ones padded."""

    spread = True

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Any, *, gradients: bool
    ) -> None:
        super().__init__(parameters, optimizer.optimizer, gradients=gradients)
        self._zero = optimizer

    def shard(self, name: str) -> Shard | None:
        """The rank's slice without the padding."""
        parameter = self._parameters[name]
        start = parameter.partition_numel() * self._zero._get_param_partition_rank(parameter)
        size = min(parameter.partition_numel(), parameter.ds_numel - start)
        if size <= 0:
            return None
        # safe_get_local_* would give copies of what is offloaded or not in fp32.
        weight, group = self._zero._get_fp32_opt_state_partition(parameter, True)
        flat = self._zero.fp32_partitioned_groups_flat[group]
        _, place, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        gradient = None
        if self._gradients:
            held, _ = self._zero._get_fp32_grad_state_partition(parameter, True)
            gradient = held.narrow(0, 0, size)
        shape, weight = torch.Size(parameter.ds_shape), weight.detach()[:size]
        return self._piece(name, shape, start, weight, gradient, flat, place)

    def whole(self, name: str) -> Tensor:
        """The weight put together from the ranks' slices."""
        return safe_get_full_fp32_param(self._parameters[name])

    def publish(self) -> None:
        """Round the masters into the slices; what is small enough to stay whole is gathered."""
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        stay = [p for p in self._parameters.values() if p.ds_status == ZeroParamStatus.AVAILABLE]
        if stay:
            stay[0].partition(stay)
            stay[0].all_gather(stay)


_KNOWN: dict[type, type[ParameterShards]] = {
    FP16_UnfusedOptimizer: CopiedShards,
    DeepSpeedZeroOptimizer: PartitionShards,
    DeepSpeedZeroOptimizer_Stage3: SliceShards,
}
"""By DeepSpeed's wrapper of the optimiser; one derived from these may keep things elsewhere."""


def shards_of(engine: Any, *, gradients: bool) -> ParameterShards:
    """The pieces of a DeepSpeed engine's parameters (those of the objective's student).

    Args:
        engine: a ``DeepSpeedEngine``; no state swapped to NVMe.
        gradients: whether a backward pass is done whose step is still to be taken.

    Raises:
        ConfigError: its optimiser is of a kind whose pieces are not known.
    """
    named = engine.module.named_parameters()
    trained = {name.removeprefix("student."): p for name, p in named if p.requires_grad}
    optimizer = engine.optimizer
    cls = ParameterShards if optimizer is engine.basic_optimizer else _KNOWN.get(type(optimizer))
    if cls is None:
        raise ConfigError(
            f"deepspeed: it has DeepSpeed step by its {type(optimizer).__name__}, whose weights "
            "and gradients cannot be edited here; take another ZeRO stage or leave out what asks "
            "for that optimizer"
        )
    return cls(trained, optimizer, gradients=gradients)
