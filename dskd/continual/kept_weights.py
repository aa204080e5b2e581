"""What a task leaves for the next one's penalty: importances so far, and the weights to stay near.

Both are made when the task's model is trained, in a folder of two files
(:mod:`dskd.continual.whole_tensors`), of which ``omega.safetensors`` is written last: where it is,
all is there. A folder that was interrupted is made again as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from dskd.continual.whole_tensors import WholeTensors, write_tensors
from dskd.system import dist

OMEGA_FILE = "omega.safetensors"
ANCHOR_FILE = "anchor.safetensors"


class KeptWeights(NamedTuple):
    """What an earlier task left, verified.

    Attributes:
        omega: the sum of the importances of all tasks until then.
        anchor: the weights that the next task is pulled towards.
    """

    omega: WholeTensors
    anchor: WholeTensors

    @classmethod
    def of(cls, folder: Path, expect: Mapping[str, str]) -> KeptWeights:
        """Open a folder that :func:`keep_weights` made (collective).

        Args:
            expect: fingerprints that it must have been made with, by name.

        Raises:
            StoreError: a file is missing, damaged, or made of something else.
        """
        omega = WholeTensors(folder / OMEGA_FILE, kind="importance", expect=expect)
        return cls(omega, WholeTensors(folder / ANCHOR_FILE, kind="anchor", expect=expect))

    def check_model(self, model: nn.Module) -> None:
        """Refuse what was left by a model of other parameters.

        Raises:
            StoreError: names the file and the first parameter that differs.
        """
        for file in self:
            file.check_model(model)


def keep_weights(
    folder: Path,
    trained: Callable[[], nn.Module],
    importance: Callable[[nn.Module], Mapping[str, Tensor]],
    *,
    fingerprints: Mapping[str, str],
    earlier: KeptWeights | None = None,
    start: Callable[[], nn.Module] | None = None,
) -> bool:
    """Measure a trained model and write the folder, or do nothing if it is whole (collective).

    Args:
        trained: builds the model, whole on every rank.
        importance: of the model's parameters, for this task alone
            (:class:`dskd.continual.importance.ImportanceSweep`).
        fingerprints: of everything that the files depend on, by name.
        earlier: what the task before left; None: this one is the first.
        start: builds the model that the first task began with: then the anchor is that for all
            tasks, as the original has it. None: the anchor is the trained model.

    Returns:
        Whether it was made now.

    Raises:
        StoreError: the folder holds something else, or a damaged file.
        DiskError: it cannot be written.
        NonFiniteError: the importances are not finite.
    """
    if dist.on_rank0((folder / OMEGA_FILE).exists):
        KeptWeights.of(folder, fingerprints)
        return False
    model = trained()
    if earlier is not None:
        earlier.check_model(model)
    omega = importance(model)
    if earlier is not None:
        omega = {name: value + earlier.omega.whole(name) for name, value in omega.items()}
    anchor: dict[str, Tensor]
    if start is not None and earlier is not None:
        anchor = {name: earlier.anchor.whole(name) for name in omega}
    else:
        named = dict((model if start is None else start()).named_parameters())
        anchor = {name: named[name].detach().cpu() for name in omega}
    prints = dict(fingerprints)
    write_tensors(folder / ANCHOR_FILE, anchor, kind="anchor", fingerprints=prints)
    write_tensors(folder / OMEGA_FILE, omega, kind="importance", fingerprints=prints)
    return True
