"""Tables of a hardness store under some settings: ``dskd hard-tokens``.

How many tokens are hard and how many of them would be masked, by domain; how the negative
log-likelihoods (NLL) are spread; and which tokens are hard most often. No model runs, so a
threshold or a metric can be chosen before it is used: ``data.masking.threshold=0.5``.

Shape letters: B rows, T tokens, N counted tokens, D domains, V vocabulary.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dskd.batch import IGNORE
from dskd.data.prepared import Prepared, open_prepared, prepare
from dskd.data.tokenizers import special_ids, vocabulary_size
from dskd.errors import ConfigError, StoreError
from dskd.hardness.masks import HARD_LABELS, HardCausalView, hard_view
from dskd.hardness.row_masks import HardTokenMasks
from dskd.hardness.scoring import scoring_view
from dskd.hardness.store import Hardness
from dskd.settings.checks import problems_of, refuse_problems
from dskd.settings.data import HardTokens
from dskd.settings.folders import questions_folder
from dskd.settings.recipe import read
from dskd.settings.run import Run
from dskd.stores.fingerprints import prints_of_rows
from dskd.stores.manifest import MANIFEST
from dskd.system.files import write_atomic

FORMATS = ("png", "svg", "pdf")
EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Nats at which the table of NLLs begins a new line."""

_ROWS = 1024  # read at once
_MAGNITUDES = 1 << 15  # bit patterns of a float16 that is not negative, in the order of its values
_NLL_BY_MAGNITUDE = np.arange(_MAGNITUDES, dtype=np.uint16).view(np.float16).astype(np.float64)
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Findings:
    """Counts over all tokens of the training rows that are not special.

    Attributes:
        domains: names.
        tokens_D: tokens by domain.
        hard_D: those that are hard.
        wrong_D: those for which the model held another token for likelier.
        taken_D: those that are masked in the epoch; of a causal LM, that count as hard after
            ``most``.
        nll_D: their summed NLL, nats.
        magnitudes: int64 [2^15], tokens by the bit pattern of their float16 NLL.
        seen_V: how often each token occurs.
        hard_V: how often it is hard.
        cut: the NLL that hard tokens exceed; None for the metric ``correctness``.
    """

    domains: list[str]
    tokens_D: NDArray[np.int64]
    hard_D: NDArray[np.int64]
    wrong_D: NDArray[np.int64]
    taken_D: NDArray[np.int64]
    nll_D: NDArray[np.float64]
    magnitudes: NDArray[np.int64]
    seen_V: NDArray[np.int64]
    hard_V: NDArray[np.int64]
    cut: float | None

    def above(self, nll: float) -> int:
        """Number of tokens with a larger NLL."""
        return int(self.magnitudes[nll < _NLL_BY_MAGNITUDE].sum())

    def most_often_hard(self, top: int) -> NDArray[np.int64]:
        """Ids of the tokens that are hard most often, those first."""
        order_V = np.lexsort((np.arange(len(self.hard_V)), -self.hard_V))[:top]
        return order_V[self.hard_V[order_V] > 0]


def main(words: Sequence[str]) -> int:
    """The command ``dskd hard-tokens RUN [a.b=value ...]``; returns the exit status.

    ``--epoch`` is the one whose masks, and with ``refresh`` whose scores, are looked at.

    Raises:
        ConfigError: no single run there has a masking of hard tokens, or its settings are wrong.
        StoreError: its store is missing, damaged or of other rows.
    """
    parser = argparse.ArgumentParser(
        prog="dskd hard-tokens", description="Say which tokens are hard for a run's model."
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="a run's folder or settings file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="other settings to try")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="an image to write")
    parser.add_argument("--top", type=int, default=30, metavar="N", help="tokens to show (30)")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="epoch to look at (0)")
    options = parser.parse_args(words)
    plot, epoch = options.plot, options.epoch
    if plot is not None and plot.suffix[1:] not in FORMATS:
        raise ConfigError(f"hard-tokens: --plot: {plot} is not one of {', '.join(FORMATS)}")
    if epoch < 0:
        raise ConfigError(f"hard-tokens: --epoch: {epoch} is less than 0, the first")
    run = run_at(options.path, options.overrides)
    prepared, hardness = _opened(run, epoch)
    found = find(run, prepared, hardness, epoch)
    names = prepared.tokenizer.convert_ids_to_tokens(found.most_often_hard(options.top).tolist())
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    # The model is not at hand, so which one scored the tokens is printed and not checked.
    model = hardness.store.spec.fingerprints["model"]
    print(f"scores in {hardness.store.folder}, of the model with fingerprint {model}")
    for table in (_shares(run, found), _spread(found), _tokens(found, names)):
        console.print(table)
    if plot is not None:
        buffer = io.BytesIO()
        _figure(found, names).savefig(buffer, format=plot.suffix[1:], dpi=110)
        write_atomic(plot, buffer.getvalue(), "the plot")
        console.print(f"plot: {plot}")
    return 0


def run_at(path: Path, overrides: Iterable[str]) -> Run:
    """The only run with a masking of hard tokens that a folder or settings file is about.

    Raises:
        ConfigError: there is none, or there are several.
    """
    recipe = read(path / "config.yaml" if path.is_dir() else path, overrides)
    hard = {n: r for n, r in recipe.runs.items() if isinstance(r.data.masking, HardTokens)}
    if not hard:
        raise ConfigError(f"{path}: data.masking.kind is hard_tokens in none of its runs")
    if len(hard) > 1:
        folders = ", ".join(str(run.out) for run in hard.values())
        raise ConfigError(
            f"{path}: several runs mask hard tokens; name the folder of one: {folders}"
        )
    name, run = next(iter(hard.items()))
    masks = HardTokenMasks(run).problems(frozenset({HARD_LABELS}), cached=False)
    refuse_problems(
        chain(problems_of(run, world=1), masks), f"runs.{name}" if len(recipe.runs) > 1 else ""
    )
    return run


def find(run: Run, prepared: Prepared, hardness: Hardness, epoch: int = 0) -> Findings:
    """Read the whole store, and mask every row as ``epoch`` does, whose store it is."""
    view = hard_view(
        run.data,
        prepared.tokenizer,
        run.seed,
        lambda _: hardness,
        scores=hardness.fingerprint,
        rowset=prepared.train,
    )
    special_V = special_ids(prepared.tokenizer)
    domains, vocabulary = len(prepared.domains), vocabulary_size(prepared.tokenizer)
    counts = {name: np.zeros(domains) for name in ("tokens", "hard", "wrong", "taken", "nll")}
    magnitudes = np.zeros(_MAGNITUDES, np.int64)
    seen_V, hard_V = np.zeros(vocabulary, np.int64), np.zeros(vocabulary, np.int64)
    for begin in range(0, len(prepared.train), _ROWS):
        row_ids_B = np.arange(begin, min(begin + _ROWS, len(prepared.train)))
        rows = prepared.train.rows(row_ids_B, np.full_like(row_ids_B, epoch))
        nll_BT, hard_BT = view.criterion(rows)
        _, wrong_BT = hardness.read(rows)
        targets_BT = hardness.plan.targets(rows)
        counted_BT = ~np.isnan(nll_BT) & ~special_V[targets_BT]
        causal = isinstance(view, HardCausalView)  # then it is the labels that count as hard
        taken_BT = view.hard(rows) if causal else view(rows).labels_BT != IGNORE
        values = {
            "tokens": counted_BT,
            "hard": hard_BT & counted_BT,
            "wrong": wrong_BT & counted_BT,
            "taken": taken_BT & counted_BT,
            "nll": np.where(counted_BT, nll_BT, 0.0),
        }
        for name, value_BT in values.items():
            counts[name] += np.bincount(rows.domains_B, value_BT.sum(1, dtype=np.float64), domains)
        magnitudes_N = nll_BT[counted_BT].astype(np.float16).view(np.uint16)
        magnitudes += np.bincount(magnitudes_N, minlength=_MAGNITUDES)
        seen_V += np.bincount(targets_BT[counted_BT], minlength=vocabulary)
        hard_V += np.bincount(targets_BT[values["hard"]], minlength=vocabulary)
    return Findings(
        domains=prepared.domains,
        **{
            f"{name}_D": value if name == "nll" else value.astype(int)
            for name, value in counts.items()
        },
        magnitudes=magnitudes,
        seen_V=seen_V,
        hard_V=hard_V,
        cut=None if run.data.masking.metric == "correctness" else view.criterion.cut(0),
    )


def _opened(run: Run, epoch: int) -> tuple[Prepared, Hardness]:
    """The rows, and the store that the epoch's masks are read from."""
    refresh = run.data.masking.refresh
    refresh_index = 0 if refresh is None else epoch // refresh
    folder = questions_folder(run, refresh_index)
    if not (folder / MANIFEST).exists():
        how = "`until=question`"
        if refresh_index:
            how = f"training, once {refresh_index * refresh} epochs are over,"
        raise StoreError(f"{folder}: no such store; {how} makes it")
    prepared = open_prepared(prepare(run.data), verify=False)
    view = scoring_view(run.data, prepared.tokenizer, run.seed)
    prints = {**prints_of_rows(run, prepared), "scoring": view.fingerprint}
    return prepared, Hardness(folder, prints)


def _shares(run: Run, found: Findings) -> Table:
    title = f"Hard tokens: {_criterion(run.data.masking, found)}"
    taken = ("after most", "%") if run.data.objective == "causal" else ("masked", "masked %")
    names = ("domain", "tokens", "hard", "hard %", *taken, "not first guess %", "mean NLL")
    table = _table(title, *names)
    rows = [(name, [index]) for index, name in enumerate(found.domains)]
    rows += [("all", list(range(len(found.domains))))] * (len(rows) > 1)
    for name, where in rows:
        tokens = int(found.tokens_D[where].sum())
        hard, taken, wrong = (
            int(count_D[where].sum()) for count_D in (found.hard_D, found.taken_D, found.wrong_D)
        )
        each = max(tokens, 1)
        table.add_row(
            Text(name),
            f"{tokens:,}",
            f"{hard:,}",
            f"{hard / each:.2%}",
            f"{taken:,}",
            f"{taken / each:.2%}",
            f"{wrong / each:.2%}",
            f"{found.nll_D[where].sum() / each:.4f}",
        )
    return table


def _criterion(masking: HardTokens, found: Findings) -> str:
    if masking.metric == "correctness":
        return "those that are not the model's first guess"
    hardest = f", the hardest {masking.quantile:g}" if masking.metric == "quantile" else ""
    return f"NLL above {found.cut:.4g} nats{hardest}"


def _spread(found: Findings) -> Table:
    table = _table("NLL (nats)", "from", "tokens", "%", "above %")
    table.add_column("", justify="left")
    bounds_E = np.searchsorted(_NLL_BY_MAGNITUDE, EDGES)
    tokens_E = np.add.reduceat(found.magnitudes, bounds_E)
    total = max(int(tokens_E.sum()), 1)
    for edge, tokens in zip(EDGES, tokens_E.tolist(), strict=True):
        bar = "#" * round(_BAR * tokens / max(tokens_E.max(), 1))
        above = found.above(edge) / total
        table.add_row(f"{edge:g}", f"{tokens:,}", f"{tokens / total:.2%}", f"{above:.2%}", bar)
    return table


def _tokens(found: Findings, names: list[str]) -> Table:
    table = _table("Most often hard", "token", "id", "occurs", "hard", "hard %")
    for name, index in zip(names, found.most_often_hard(len(names)).tolist(), strict=True):
        seen, hard = int(found.seen_V[index]), int(found.hard_V[index])
        table.add_row(Text(name), str(index), f"{seen:,}", f"{hard:,}", f"{hard / seen:.2%}")
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    columns = [Column(name, justify="right") for name in numbers]
    return Table(first, *columns, title=title, title_justify="left")


def _figure(found: Findings, names: list[str]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    spread, often = figure.subplots(1, 2)
    nll = np.maximum(_NLL_BY_MAGNITUDE[:-1024], 1e-4)  # the last 1024 are infinite and no numbers
    top = max(10.0, float(nll[found.magnitudes[:-1024] > 0].max(initial=0)))
    bins = np.geomspace(1e-4, top * 1.001, 80)
    spread.hist(nll, bins=bins, weights=found.magnitudes[:-1024], color="0.6")
    if found.cut is not None and found.cut > 0:
        spread.axvline(found.cut, color="C3", label=f"hard above {found.cut:.4g}")
        spread.legend()
    spread.set(xscale="log", xlabel="NLL (nats); the first bar holds all below", ylabel="tokens")
    index = found.most_often_hard(len(names))
    places = np.arange(len(index))
    often.barh(places, found.seen_V[index], color="0.85", label="occurs")
    often.barh(places, found.hard_V[index], color="C3", label="hard")
    often.set_yticks(places, [name.replace("$", r"\$") for name in names], fontsize=7)
    often.invert_yaxis()
    often.set(xlabel="tokens")
    often.legend()
    return figure
