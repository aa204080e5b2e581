"""Checkpoints hold numbers and a few classes of DeepSpeed: read without running what else is there.

They are pickles, in which a stranger could put code. DeepSpeed 0.19.8 reads them with
``weights_only=False``; a switch of torch's own goes before that.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dskd.errors import CheckpointError
from dskd.system import dist

_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
_UNKNOWN = "holds what no checkpoint of dskd does, and is not loaded"
_ONLY, _NOT_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def check_pickles(folder: Path) -> None:
    """Look what this rank's share of a checkpoint's pickles would load, and load nothing.

    An error that only one rank found while all load would leave the others waiting.

    Raises:
        CheckpointError: names the file, and the code or class that no checkpoint has.
    """
    for path in sorted(folder.glob("*.pt"))[dist.rank() :: dist.world()]:
        if not is_zipfile(path):  # of torch's older format, into which only loading looks
            continue
        try:
            with safe_globals(_CLASSES):
                found = get_unsafe_globals_in_checkpoint(path)
        except Exception as problem:  # whatever a file of any content may raise
            raise CheckpointError(f"{path}: no pickle of torch's ({problem})") from problem
        if found:
            raise CheckpointError(f"{path}: {_UNKNOWN}: {', '.join(sorted(found))}")


@contextmanager
def only_weights(path: Path) -> Iterator[None]:
    """Inside, nothing that is loaded from ``path``, a file or a folder of them, is run as code.

    Raises:
        CheckpointError: there is something else in one of them.
    """
    before = {name: os.environ.pop(name, None) for name in (_ONLY, _NOT_ONLY)}
    os.environ[_ONLY] = "1"
    try:
        with safe_globals(_CLASSES):
            yield
    except pickle.UnpicklingError as problem:
        raise CheckpointError(f"{path}: {_UNKNOWN}: {problem}") from problem
    finally:
        del os.environ[_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})
