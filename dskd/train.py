"""Train a recipe: ``deepspeed --num_gpus 8 dskd/train.py [FILE.yaml] [a.b=value ...]``.

Without arguments, a 20-step toy run. The same command goes on after an interruption, skips what is
done, and refuses to go on if a setting that matters has changed; but a run may get more steps, also
a finished one, and for those to come another rate.

Exit status: 0 done; 2 something the user can mend, in one message; 69 a rank has died, hangs or
never came, named in one message by one of the others; 75 stopped by SIGTERM, SIGINT or the death
of the launcher, in training with a checkpoint of that step on disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # `deepspeed dskd/train.py` puts dskd/ on the path, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
import signal
from collections.abc import Sequence

from dskd.errors import DskdError, LostRankError
from dskd.system.launcher import stop_with_launcher

USAGE = "usage: deepspeed --num_gpus N dskd/train.py [FILE.yaml] [a.b=value ...]"
MENDABLE, STOPPED = 2, 75
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that tune how torch reserves GPU memory; the user's own are left alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe named by ``argv`` (default: the command line); returns the exit status."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    words = list(argv) if argv is not None else words
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{USAGE}")
        return 0
    # Rows differ in width from batch to batch, and blocks of fixed size would be kept for each.
    # Before torch is imported, on every rank; PyTorch 2.8 knows the first name only.
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))
    try:
        status = _status(words)
    except BaseException as problem:
        _say_goodbye(problem)
        raise
    _say_goodbye(status)
    return status


def _status(words: list[str]) -> int:
    try:
        return _run(words)
    except LostRankError as problem:
        if not problem.printed_by_other_rank:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return problem.status
    except DskdError as problem:
        # Before the group exists every rank of a node finds the same mistakes.
        if not problem.printed_by_other_rank and (
            _grouped() or os.environ.get("LOCAL_RANK", "0") == "0"
        ):
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return MENDABLE


def _say_goodbye(how: int | BaseException) -> None:
    """Tell the ranks that watch this one how it ends; none do before that file is imported."""
    watch = sys.modules.get("dskd.system.watch")
    if watch is not None:
        watch.end(how)


def _run(words: list[str]) -> int:
    from dskd.settings.checks import check_settings
    from dskd.settings.recipe import read

    dashed = [word for word in words if word.startswith("-")]
    if dashed:
        raise DskdError(f"{dashed[0]}: settings are written a.b=value, without dashes\n{USAGE}")
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise DskdError(f"one settings file, not {len(files)}: {' '.join(files)}\n{USAGE}")
    overrides = [word for word in words if "=" in word]
    recipe = read(Path(files[0]) if files else None, overrides)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_settings(recipe, world)

    # After that: they take seconds to import, and a mistyped setting is told at once.
    from dskd.methods.base import build_method

    methods = {name: build_method(run.method) for name, run in recipe.runs.items()}

    from dskd.runs import plan
    from dskd.system.log import say
    from dskd.training.trainer import Interrupted

    plan.check(recipe, methods, world=world)
    one_node = os.environ.get("LOCAL_SIZE") == os.environ.get("WORLD_SIZE")
    if one_node and plan.is_done(recipe, methods):  # several may not all see the files at once
        if os.environ.get("RANK", "0") == "0":
            plan.report(recipe, methods)
        _say_rest(files, recipe.downstream is not None)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        # Between the step loops, which have a handler of their own, there is nothing to save.
        signal.signal(number, lambda number, frame: sys.exit(STOPPED))
    try:
        plan.execute(recipe, methods)
    except Interrupted as stop:
        say(f"{stop}; the same command goes on from there")
        return STOPPED
    _say_rest(files, recipe.downstream is not None)
    return 0


def _say_rest(files: list[str], downstream: bool) -> None:
    """Say what carries out the section ``downstream`` of a file, if it has one."""
    if downstream and os.environ.get("RANK", "0") == "0":
        print(f"its section downstream: dskd downstream {files[0]}", flush=True)


def _grouped() -> bool:
    """Whether a process group exists (torch may not even be imported yet)."""
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_initialized()


if __name__ == "__main__":
    stop_with_launcher(STOPPED)
    sys.exit(main())
