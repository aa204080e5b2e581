"""The DeepSpeed engine behind a narrow door: forward, backward, step, save, load.

Loss scale: the trainer divides by global counts, so the summed gradient over ranks is wanted;
DeepSpeed averages gradients over ranks and divides by the accumulation steps, so the loss is
multiplied by the world size and the accumulation scale is switched off.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import ops as deepspeed_ops
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

from dskd.batch import Batch, Loss, Term
from dskd.engine import saving
from dskd.engine.ds_config import precision_of
from dskd.engine.loading import only_weights
from dskd.engine.shards import ParameterShards, shards_of
from dskd.engine.zero import full_shape
from dskd.system import dist, watch
from dskd.system.device import on_gpu
from dskd.system.joining import join

_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


def start(ranks_timeout: float = 10) -> torch.device:
    """Join the process group the launcher describes (or a group of one); return this rank's device.

    Args:
        ranks_timeout: minutes after which a rank is lost, from the start on: see ``system/watch``.

    Raises:
        LostRankError: a rank does not come.
        ConfigError: the ranks have no place to meet.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls torch.distributed by names that torch 2.13 is about to drop.
    warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)
    cuda = on_gpu()
    if not cuda:
        # Compiled with g++ at start-up, for a minute, and hangs on the lock of a killed build.
        deepspeed_ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    _meet(ranks_timeout)
    # Longer than a rank is waited for: the watch can name it, a collective cannot.
    timeout = timedelta(minutes=(watch.LONG + 1) * ranks_timeout + 20)
    # It binds NCCL to this rank's device, unless it is alone (where that fails: its issue 8248).
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout, verbose=False)
    dist.add_host_group(timeout)
    return device


def _meet(minutes: float) -> None:
    """Wait for the other ranks, and watch over them from now on; one alone waits for none."""
    if os.environ.get("MASTER_PORT") == "0" or torch.distributed.is_initialized():
        return
    store = join(minutes)
    if int(os.environ["WORLD_SIZE"]) > 1:
        watch.begin(store, minutes)


def stop() -> None:
    """Leave the process group."""
    dist.leave()


def stage_of(ds: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(ds.get("zero_optimization", {}).get("stage", 0))


def decay_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; vectors (biases, norms) only if ``decay_all``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if decay_all:
        return [{"params": trained, "weight_decay": weight_decay}]
    matrices = [p for p in trained if len(full_shape(p)) > 1]
    vectors = [p for p in trained if len(full_shape(p)) <= 1]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


class Engine:
    """A model under training by DeepSpeed.

    Args:
        objective: the module whose forward takes (batch, step, loss) and returns terms by name.
        groups: parameter groups, see :func:`decay_groups`; one may have an ``lr_scale``, by which
            the learning rate is multiplied for it.
        ds: a DeepSpeed config without any ``auto``.
        monitor: whether :meth:`log` reaches the monitors that ``ds`` names.
    """

    def __init__(
        self,
        objective: nn.Module,
        groups: list[dict[str, Any]],
        ds: dict[str, Any],
        *,
        monitor: bool,
    ) -> None:
        silent = {key: value for key, value in ds.items() if key not in _MONITORS}
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        self._group_names = [[names[id(p)] for p in group["params"]] for group in groups]
        # Ours, not the optimizer's: a checkpoint would bring back another run's.
        self._lr_scales = [group.get("lr_scale", 1.0) for group in groups]
        own = [{key: v for key, v in group.items() if key != "lr_scale"} for group in groups]
        self._engine, *_ = deepspeed.initialize(
            model=objective, model_parameters=own, config=silent
        )
        self.stage = stage_of(ds)
        if self.stage == 0 and precision_of(ds) != "fp32":
            self._undo_dry_step()
        # Ours, not the engine's: that one would log our loss as multiplied for its averaging.
        self._monitor = MonitorMaster(get_monitor_config(ds if monitor else silent))

    def _undo_dry_step(self) -> None:
        """At ZeRO-0 in 16 bits DeepSpeed takes an Adam step on zero gradients when it starts, which
        decays the weights and sets the bias correction one step ahead of the other stages."""
        wrapper = self._engine.optimizer
        wrapper.optimizer.state.clear()
        for low_group, full_group in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for low, full in zip(low_group, full_group, strict=True):
                full.data.copy_(low.data)

    @property
    def module(self) -> nn.Module:
        """The objective, as DeepSpeed holds it."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self._engine.device)

    def forward(self, batch: Batch, step: int, loss: Loss | None = None) -> dict[str, Term]:
        """The terms of one micro-batch: of the method's loss, or of another."""
        return self._engine(batch, step, loss)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss``, this rank's share of the global mean.

        Args:
            loss: of one micro-batch.
            last: whether the gradient is complete after it, and reduced over the ranks.
        """
        # DeepSpeed's own count of micro-batches knows nothing of passes that no step follows. At
        # ZeRO-1 the gradients of passes that are no boundary are not reduced over the ranks.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * dist.world(), scale_wrt_gas=False)

    def forget(self) -> None:
        """Drop the gradient of the passes since the last step, as if they had not been made.

        What DeepSpeed 0.19.8 does where fp16 overflow skips a step, which it offers nowhere alone.
        """
        optimizer = self._engine.optimizer
        if optimizer is self._engine.basic_optimizer:  # ZeRO-0 in fp32
            self._engine.zero_grad()
            return
        # At ZeRO-3 this also restarts the count of passes, of which the first one's gradients are
        # copied into the buffers and the others' added.
        optimizer.zero_grad(set_to_none=True)
        if self.stage:
            optimizer.averaged_gradients.clear()  # complete ones
        if self.stage in (1, 2):
            optimizer.all_grad_tensors.clear()  # those of passes that were no boundary
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID  # by which an offloaded one adds up

    def grad_norm(self) -> Tensor | None:
        """Global gradient norm before clipping, a float64 scalar still on the device: after the
        last backward at ZeRO-0 in fp32, after the step at the other stages."""
        norm = self._engine.get_global_grad_norm()
        if norm is None and self.stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        if norm is None:
            return None
        return torch.as_tensor(norm, dtype=torch.float64, device=self.device).reshape(())

    def set_rate(self, lr: float) -> None:
        """Set the next step's learning rate, in each group times its ``lr_scale``."""
        groups = self._engine.optimizer.param_groups
        for group, scale in zip(groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale

    def weights(self, *, gradients: bool) -> ParameterShards:
        """What this rank holds of the student's parameters, editable; with gradients between the
        last backward pass and the step."""
        return shards_of(self._engine, gradients=gradients)

    def step(self) -> bool:
        """Take an optimiser step; False if fp16 overflow skipped it."""
        self._engine.step()
        return self._engine.was_step_applied()

    def log(self, values: dict[str, float], step: int) -> None:
        """Send values to the monitors of the DeepSpeed config (TensorBoard, W&B, CSV, Comet)."""
        if self._monitor.enabled and dist.rank() == 0:
            events = [(name, float(value), step) for name, value in values.items()]
            self._monitor.write_events(events)

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's part of ``folder/tag`` (collective).

        Raises:
            DiskError: a rank cannot; on every rank.
        """
        saving.save(self._engine, folder, tag, {"dskd_groups": self._group_names})

    def load(self, folder: Path, tag: str) -> None:
        """Read back a checkpoint: one of the same world size and ZeRO stage, or, if the config said
        ``load_universal``, one in universal form (collective).

        Raises:
            CheckpointError: it holds other things than a checkpoint does.
        """
        decays = [group["weight_decay"] for group in self._engine.optimizer.param_groups]
        with only_weights(folder / tag):
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        assert path is not None, f"{folder}/{tag}: DeepSpeed found no checkpoint"
        # Loading a universal checkpoint at ZeRO-3 gives every group the first group's settings, and
        # all of them one step counter, which each would then advance.
        for group, decay in zip(self._engine.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in self._engine.basic_optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    @torch.no_grad()
    def load_plain(self, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> None:
        """Take weights and Adam state, by name and maybe flat, into an fp32 ZeRO-0 engine."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(weights[name].view_as(parameter))
            state = {key: value.to(parameter.device) for key, value in moments[name].items()}
            shaped = {key: v if key == "step" else v.view_as(parameter) for key, v in state.items()}
            self._engine.optimizer.state[parameter] = shaped

    def destroy(self) -> None:
        """Give back DeepSpeed's buffers and hooks, so that another engine may follow."""
        self._engine.destroy()


def shard_teacher(model: nn.Module, ds: dict[str, Any]) -> nn.Module:
    """Put a frozen model into a ZeRO-3 engine of its own, without optimizer; returns the module."""
    engine, *_ = deepspeed.initialize(model=model, config=ds)
    return engine.module
