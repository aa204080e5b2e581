"""The ``dskd`` command. What is heavy is imported by the command that needs it.

``dskd train`` runs one process; ``deepspeed --num_gpus N dskd/train.py`` takes the same arguments
and runs N. ``deepspeed --num_gpus N --module dskd.cli generate ...`` generates with N.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dskd import __version__
from dskd.errors import ConfigError, DskdError, LostRankError
from dskd.system.launcher import stop_with_launcher

MENDABLE, STOPPED = 2, 75
_SETTINGS = "settings file and overrides: [FILE.yaml] [a.b=value ...]; none: the 20-step toy run"


COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("write a fairseq, UER or LAMOL model as a folder", "dskd.convert.command:main"),
    "downstream": (
        "fine-tune models on tasks, over rates and seeds, and compare their scores",
        "dskd.downstream.command:main",
    ),
    "hard-tokens": ("say which tokens are hard for a run's model", "dskd.hardness.report:main"),
    "generate": ("write how a causal model goes on with prompts", "dskd.runs.generate:main"),
    "pairs": (
        "say which of two sentences a language model prefers",
        "dskd.downstream.pairs_command:main",
    ),
    "predict": ("write a classifier's label and probabilities of rows", "dskd.runs.predict:main"),
}
"""Commands that a method or a stage brings: what each does, and where its ``main(words)`` is found,
``module:function``. One from outside this package is called by that name itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (default: the process's own arguments); returns the exit status."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    words = words if argv is None else list(argv)
    try:
        brought = _brought(words[0]) if words else None
        if brought is not None:
            return brought(words[1:])
        arguments = _parser().parse_args(words)
        return arguments.run(arguments)
    except DskdError as problem:
        if not problem.printed_by_other_rank:
            print(f"error: {problem}", file=sys.stderr)
        return problem.status if isinstance(problem, LostRankError) else MENDABLE


def _brought(name: str) -> Callable[[Sequence[str]], int] | None:
    """The function behind a command of ``COMMANDS``, or behind ``module:function``."""
    _, target = COMMANDS.get(name, ("", name))
    if ":" not in target:
        return None
    from dskd.settings.parsing import named_object

    found = named_object(target, "command line")
    if not callable(found):
        raise ConfigError(f"command line: {target} is no function")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dskd", description="Train language models that inherit what other models know."
    )
    parser.add_argument("--version", action="version", version=f"dskd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _with_settings(commands, "train", "carry out a run or recipe", until=None)
    _with_settings(commands, "data", "prepare its rows only", until="data")
    _with_settings(commands, "export", "train it and write its model", until="export")
    settings = _with_settings(commands, "settings", "print its resolved settings", until=None)
    settings.set_defaults(run=_settings)

    cache = commands.add_parser("cache", help="capture, check and describe logit caches")
    caches = cache.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _with_settings(caches, "capture", "capture a run's teacher logits", until="cache")
    for name, about, run in (
        ("verify", "check every byte of a cache", _cache_verify),
        ("info", "say what a cache holds, what it cost, and what is kept", _cache_info),
    ):
        command = caches.add_parser(name, help=about, description=about)
        command.add_argument("path", type=Path, metavar="PATH", help="folder of the cache")
        command.set_defaults(run=run)

    report = commands.add_parser("report", help="table and report.html of finished runs")
    report.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run or recipe"
    )
    report.add_argument("--control", metavar="NAME", help="the run to measure the others against")
    report.add_argument("--out", type=Path, default=Path(), help="where report.html goes")
    report.set_defaults(run=_report)

    for name, (about, _) in COMMANDS.items():  # for the help; main() hands their words on
        commands.add_parser(name, help=about)
    return parser


def _with_settings(
    commands: argparse._SubParsersAction, name: str, about: str, until: str | None
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=about)
    command.add_argument("words", nargs="*", metavar="FILE|a.b=value", help=_SETTINGS)
    command.set_defaults(run=_train, until=until)
    return command


def _train(arguments: argparse.Namespace) -> int:
    from dskd.train import main as train

    until = [] if arguments.until is None else [f"until={arguments.until}"]
    return train([*arguments.words, *until])


def _settings(arguments: argparse.Namespace) -> int:
    from dskd.settings.checks import check_settings
    from dskd.settings.downstream import downstream_tree
    from dskd.settings.recipe import SINGLE, dump_run, read
    from dskd.settings.yaml_tree import dump

    files = [word for word in arguments.words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one settings file, not {len(files)}: {' '.join(files)}")
    overrides = [word for word in arguments.words if "=" in word]
    recipe = read(files[0] if files else None, overrides)
    if recipe.runs or recipe.downstream is None:
        check_settings(recipe, world=1)

    from dskd.methods.base import build_method
    from dskd.methods.checks import validate
    from dskd.runs.plan import refuse_unknown_stage

    methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
    refuse_unknown_stage(recipe, methods)
    for name, run in recipe.runs.items():
        method = methods[name]
        validate(run, method, world=1, prefix=recipe.prefix(name))
        whole = run.model_copy(update={"method": method.model_dump(mode="json")})
        heading = "" if name == SINGLE else f"--- # {name}\n"
        print(heading + dump_run(whole), end="")
    if recipe.downstream is not None:
        tree = {} if recipe.runs else {"out": str(recipe.out)}
        tree["downstream"] = downstream_tree(recipe.downstream)
        print(f"--- # of dskd downstream\n{dump(tree)}", end="")
    return 0


def _cache_verify(arguments: argparse.Namespace) -> int:
    from dskd.stores.logits import verify

    _show(verify(arguments.path))
    print(f"{arguments.path}: whole")
    return 0


def _cache_info(arguments: argparse.Namespace) -> int:
    from dskd.stores.cache_info import cache_info

    _show(cache_info(arguments.path))
    return 0


def _show(values: dict[str, object]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")


def _report(arguments: argparse.Namespace) -> int:
    from dskd.runs import plan
    from dskd.runs.finding import is_run, runs_in

    runs = runs_in(arguments.folders)
    recipe = len(arguments.folders) == 1 and not is_run(arguments.folders[0])
    show = plan.report_recipe if recipe else plan.report_folders
    print(show(runs, arguments.out, arguments.control))
    return 0


if __name__ == "__main__":  # by a launcher
    stop_with_launcher(STOPPED)
    sys.exit(main())
