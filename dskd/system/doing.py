"""What a rank is at: how far it is and where it stands, for those who watch it
(``system/watch.py``). With one process nobody reads it."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).parents[1]

_WAITING = (
    "/torch/distributed/",
    "/deepspeed/",
    "/dskd/system/dist.py",
    "/dskd/system/device.py",
    "/torch/cuda/streams.py",  # below it, for an event
)
"""Files whose innermost call stands still only where others are waited for."""


@dataclass
class Doing:
    """What a rank is at; written by its main thread, read by the other one."""

    since: float = field(default_factory=time.monotonic)
    paced: bool = False
    stage: str = ""
    step: int | None = None
    checkpoint: str = ""


@dataclass(frozen=True)
class Beat:
    """How far a rank is.

    Attributes:
        still: seconds since it last got on.
        paced: whether it is in the middle of steps or batches, of which each takes about as long.
        waits: whether it stands in a collective.
        place: where in dskd it stands.
    """

    still: float = 0.0
    paced: bool = False
    waits: bool = False
    place: str = ""


_doing = Doing()


def got_on() -> None:
    """This rank has come a bit further."""
    _doing.since = time.monotonic()


def next_one() -> None:
    """This rank has taken a step or made a batch, and what comes next is another one."""
    _doing.since, _doing.paced = time.monotonic(), True


def pause() -> None:
    """What comes next is no step and no batch, and may take longer."""
    _doing.since, _doing.paced = time.monotonic(), False


def at_run() -> None:
    """A run begins, which has no checkpoint yet."""
    _doing.checkpoint = ""


def at_stage(name: str) -> None:
    """A stage begins."""
    pause()
    _doing.stage, _doing.step = name, None


def at_step(step: int) -> None:
    """A step of the optimiser begins."""
    _doing.step = step


def saved(checkpoint: Path) -> None:
    """The newest checkpoint."""
    _doing.checkpoint = str(checkpoint)


def here(at_least: float) -> Beat:
    """This process's beat; where it stands is looked up only if it has not got on for so many
    seconds."""
    still = time.monotonic() - _doing.since
    if still < at_least:
        return Beat(still, _doing.paced)
    frame = sys._current_frames().get(threading.main_thread().ident)
    return Beat(still, _doing.paced, _waits(frame), _place(frame))


def work() -> str:
    """The step or the stage, for messages: the ranks are in the same."""
    if _doing.step is not None:
        return f"in step {_doing.step}"
    return f"in the stage {_doing.stage}" if _doing.stage else "while the ranks start"


def newest_checkpoint() -> str:
    """For messages."""
    if _doing.checkpoint:
        return f"the newest checkpoint is {_doing.checkpoint}"
    return "no checkpoint was saved yet"


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread that is there waits for other ranks: in a collective, in DeepSpeed around
    one, or where a step's numbers are read, for all that the device has to do before."""
    if frame is None:
        return False
    path = Path(frame.f_code.co_filename).as_posix()
    return any(place in path for place in _WAITING)


def _place(frame: FrameType | None) -> str:
    """File, line and function, the innermost of dskd."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "an unknown place"
