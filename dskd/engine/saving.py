"""DeepSpeed's part of a checkpoint, written by all ranks, or by none of them.

While DeepSpeed saves its ranks wait for one another. An error of one rank, raised at once, would
leave the others waiting, so it is kept until all are through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from dskd.engine.checkpoints import WHAT
from dskd.errors import DiskError
from dskd.system import dist
from dskd.system.disk import writing


def save(engine: DeepSpeedEngine, folder: Path, tag: str, state: dict[str, Any]) -> None:
    """Write ``folder/tag`` (collective).

    Args:
        state: what is kept besides that of DeepSpeed.

    Raises:
        DiskError: a rank cannot write its part; on every rank.
    """
    with dist.agreed():
        problems: list[DiskError] = []
        with (
            _kept(engine.checkpoint_engine, "save", lambda state_dict, path: path, problems),
            _kept(engine, "_copy_recovery_script", lambda save_path: save_path, problems),
            writing(WHAT, folder / tag),
        ):
            engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
        for problem in problems:
            for script in folder.glob("zero_to_*.py") if dist.rank() == 0 else ():
                script.unlink()  # which DeepSpeed copies at every save; maybe half of it is there
            raise problem


@contextmanager
def _kept(
    owner: Any, name: str, path_of: Callable[..., str], problems: list[DiskError]
) -> Iterator[None]:
    """Meanwhile the method ``name`` puts its first error with the disk into ``problems``, and does
    nothing after it."""
    method = getattr(owner, name)

    def attempt(*args: Any, **options: Any) -> None:
        if problems:
            return
        try:
            with writing(WHAT, Path(path_of(*args, **options))):
                method(*args, **options)
        except DiskError as problem:
            problems.append(problem)

    setattr(owner, name, attempt)
    try:
        yield
    finally:
        delattr(owner, name)  # the class has it
