"""A few examples of what the exported model makes of validation rows: how a causal LM goes on with
them, or what a masked LM fills in. Kept in ``examples.json``, shown side by side in the report.

The same bytes for any number of ranks: prompts are gone on with one by one, the most likely token
each time, and every rank sees the same masked rows.

Shape letters: B rows, T tokens, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dskd.batch import IGNORE, Batch, Positions
from dskd.data.loader import evenly_spaced, make_batch
from dskd.data.prepared import RowBatch, RowSet
from dskd.data.tokenizers import start_id, vocabulary_size
from dskd.data.views import Shown, View
from dskd.engine.stage import StageContext
from dskd.errors import CheckpointError, NonFiniteError
from dskd.methods.metrics import ValueMetric
from dskd.models.continuation_files import own_tokens
from dskd.models.families import longest_row
from dskd.models.frozen import evaluating
from dskd.models.generate import Decoding, continuations
from dskd.settings.folders import RunFolder
from dskd.system import dist
from dskd.system.files import read_record, write_manifest
from dskd.system.markup import html_table
from dskd.training.objective import Objective

_PROMPT = 16
"""Most tokens of a row that a causal LM goes on with; a question is taken whole."""
_NEW = 32
"""Most tokens that it writes."""
_SHOWN = 64
"""Tokens of a masked row that are looked at, from its beginning."""

Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Continued(_Record):
    """How a causal LM goes on.

    Attributes:
        domain: of the row.
        prompt: the beginning of the row.
        text: how the row goes on.
        written: how the model does.
        ended: whether it ended there by itself.
    """

    domain: str
    prompt: str
    text: str
    written: str
    ended: bool


class Place(_Record):
    """What a masked LM says of a place.

    Attributes:
        token: that is there.
        filled: the most likely one, by the model; ``probability`` is its.
        of_token: the probability of the one that is there.
    """

    token: str
    filled: str
    probability: Share
    of_token: Share


class Filled(_Record):
    """A row as a masked LM sees it, and what it says of the places that it is asked about."""

    domain: str
    seen: str
    places: list[Place]


class Examples(_Record):
    """Of one run; one of the lists is empty."""

    continued: list[Continued] = []
    filled: list[Filled] = []


def write_examples(context: StageContext, model: PreTrainedModel, objective: Objective) -> None:
    """Write as many examples as the settings ask for, if they ask for any; of labelled rows there
    are none (collective).

    Args:
        model: the exported one, whole on each rank's device, or sharded by ZeRO-3.
        objective: holds it.

    Raises:
        DiskError: they cannot be written.
        NonFiniteError: the model's logits are not finite.
    """
    count, kind = context.run.evaluation.examples, context.run.data.objective
    if not count or kind == "classification":
        return
    if kind == "causal":
        made = Examples(continued=_continued(context, model, count))
    else:
        made = Examples(filled=_filled(context, objective, count))
    with dist.agreed():
        if dist.rank() == 0:
            write_manifest(context.folder.examples, made.model_dump(), "the examples")


def _spread(rows: RowSet, count: int) -> NDArray[np.int64]:
    """Some rows, spread over each of their domains, of which all have equally many as far as there
    are as many; the first domains have one more. The rest that a document's end may leave is none,
    unless rows are as long as their texts."""
    lengths_R = rows.lengths_B(np.arange(len(rows)))
    least = 0 if rows.by_length else min(int(lengths_R.max()) // 2, 2 * _PROMPT)
    ids_R = np.flatnonzero(lengths_R >= least)
    domains_R = rows.domains_B(ids_R)
    own = [ids_R[domains_R == domain] for domain in np.unique(domains_R)]
    shares = [0] * len(own)
    while sum(shares) < min(count, len(ids_R)):
        for n, ids in enumerate(own):
            shares[n] += shares[n] < len(ids) and sum(shares) < count
    parts = zip(own, shares, strict=True)
    return np.concatenate([ids[evenly_spaced(len(ids), share)] for ids, share in parts])


# ---- causal LMs ----------------------------------------------------------------------------------


class _Prompt(NamedTuple):
    """The beginning of a row, and what follows."""

    row: int
    tokens: NDArray[np.int64]
    behind: NDArray[np.int64]


def _continued(context: StageContext, model: PreTrainedModel, count: int) -> list[Continued]:
    prepared, tokenizer = context.prepared, context.prepared.tokenizer
    prompts = _prompts(prepared.validation, context.validation_view, count)
    decoding = Decoding(
        longest=_NEW,
        positions=longest_row(model.config),
        vocabulary=vocabulary_size(tokenizer),
        ends=(tokenizer.eos_token_id,),
        pad=tokenizer.pad_token_id,
    )
    rows = [prompt.tokens.tolist() for prompt in prompts]
    # One at a time: what is computed together depends on the number of ranks.
    found = continuations(model, rows, decoding, numbers=range(len(rows)), batch=1)
    first = start_id(tokenizer, "causal")
    domains_B = prepared.validation.domains_B(np.array([prompt.row for prompt in prompts]))
    return [
        Continued(
            domain=prepared.domains[domain],
            prompt=_text(tokenizer, prompt.tokens[int(prompt.tokens[0] == first) :]),
            text=_text(tokenizer, prompt.behind),
            written=_text(tokenizer, own_tokens(ids, decoding)),
            ended=ids[-1] in decoding.ends,
        )
        for prompt, domain, ids in zip(prompts, domains_B.tolist(), found, strict=True)
    ]


def _prompts(rows: RowSet, view: View, count: int) -> list[_Prompt]:
    """Of rows that are spread over all; behind a question its answer."""
    found = []
    for row in _spread(rows, count).tolist():
        one = np.array([row])
        given = rows.rows(one, np.zeros_like(one))
        tokens_T = given.tokens_BT[0, : int(given.lengths_B[0])]
        # The first token that is predicted, which is the second one unless rows are questions.
        begin = int((view(given).labels_BT[0] != IGNORE).argmax()) + 1
        begin = begin if begin > 1 else max(1, min(_PROMPT, len(tokens_T) // 2))
        found.append(_Prompt(row, tokens_T[:begin], tokens_T[begin : begin + _NEW]))
    return found


# ---- masked LMs ----------------------------------------------------------------------------------


class _FirstPlaces:
    """A view's masks, asked about at the beginnings of rows."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.draws, self.fingerprint = view.draws, view.fingerprint

    def __call__(self, rows: RowBatch) -> Shown:
        """As a :class:`~dskd.data.views.View`."""
        shown = self._view(rows)
        labels_BT = shown.labels_BT.copy()
        labels_BT[:, _SHOWN:] = IGNORE
        return Shown(shown.inputs_BT, labels_BT)


def _filled(context: StageContext, objective: Objective, count: int) -> list[Filled]:
    prepared, tokenizer = context.prepared, context.prepared.tokenizer
    ids_B = _spread(prepared.validation, count)
    view = _FirstPlaces(context.validation_view)
    batch = make_batch(prepared.validation, view, ids_B, np.zeros_like(ids_B))
    guess = ValueMetric(_guesses(vocabulary_size(tokenizer)), lambda values_N3: {})
    with evaluating(objective), torch.no_grad():
        (values_N3,) = objective.forward_evaluation(batch.to(context.device), [guess])
    if not values_N3.isfinite().all():
        raise NonFiniteError("the exported model's logits are not finite")
    labels = iter(zip(batch.labels_N.tolist(), values_N3.tolist(), strict=True))
    found = []
    for b, row in enumerate(batch.ids_BT.tolist()):
        length = min(int(batch.lengths_B[b]), _SHOWN)
        places = [
            Place(
                token=_token(tokenizer, label),
                filled=_token(tokenizer, int(filled)),
                probability=probability,
                of_token=of_token,
            )
            for _ in range(int(batch.counts_B[b]))
            for label, (filled, probability, of_token) in [next(labels)]
        ]
        domain = prepared.domains[int(batch.domains_B[b])]
        found.append(Filled(domain=domain, seen=_text(tokenizer, row[:length]), places=places))
    return found


def _guesses(vocabulary: int) -> Callable[[Positions, Batch], Tensor]:
    """What finds, of each position, the most likely of the real tokens, its probability and that of
    the label: float64 [N, 3]."""

    def values(positions: Positions, batch: Batch) -> Tensor:
        del batch
        probabilities_NV = positions.logits_NV.float().softmax(1).clamp(max=1)
        best_N, filled_N = probabilities_NV[:, :vocabulary].max(1)
        own_N = probabilities_NV.gather(1, positions.labels_N[:, None])[:, 0]
        return torch.stack([filled_N.double(), best_N.double(), own_N.double()], dim=1)

    return values


def _text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text; of one that is no whole letter what its vocabulary calls it."""
    text = _text(tokenizer, [token])
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text


# ---- the report ----------------------------------------------------------------------------------


def examples_section(runs: Mapping[str, RunFolder]) -> str:
    """HTML of what the runs made of the same rows, one run beside the other; empty without any.

    Raises:
        CheckpointError: a run's file is damaged.
    """
    found = {
        name: read_record(run.examples, Examples, CheckpointError)
        for name, run in runs.items()
        if run.examples.exists()
    }
    continued: dict[tuple[str, str, str], dict[str, str]] = {}
    filled: dict[tuple[str, str, tuple[str, ...]], dict[str, list[Place]]] = {}
    for name, made in found.items():
        for one in made.continued:
            written = f'"{one.written}"' + (" and ends" if one.ended else "")
            continued.setdefault((one.domain, one.prompt, one.text), {})[name] = written
        for row in made.filled:
            tokens = tuple(place.token for place in row.places)
            filled.setdefault((row.domain, row.seen, tokens), {})[name] = row.places
    parts = [f"<p>{about}</p>" for about, some in ((_GOES_ON, continued), (_FILLS, filled)) if some]
    parts += [
        _example(domain, prompt, ["", "goes on"], [["the text", f'"{text}"'], *by_run.items()])
        for (domain, prompt, text), by_run in continued.items()
    ]
    parts += [
        _example(domain, seen, ["the text", *by_run], _guess_rows(tokens, by_run))
        for (domain, seen, tokens), by_run in filled.items()
    ]
    return "\n".join(["<h2>Examples of validation rows</h2>", _STYLE, *parts]) if parts else ""


def _guess_rows(tokens: Sequence[str], by_run: Mapping[str, list[Place]]) -> list[list[str]]:
    """A line for each token that is asked about, and what each run says."""
    return [
        [_visible(token), *(_guess(places[n]) for places in by_run.values())]
        for n, token in enumerate(tokens)
    ]


def _guess(place: Place) -> str:
    own = "" if place.filled == place.token else f" ({place.of_token:.1%})"
    return f"{_visible(place.filled)} {place.probability:.1%}{own}"


def _visible(token: str) -> str:
    """A token with signs for its spaces and line ends."""
    return token.replace(" ", "\u2423").replace("\n", "\u23ce")


def _example(domain: str, text: str, header: list[str], rows: Sequence[Sequence[str]]) -> str:
    about = f"<p><b>{html.escape(domain)}</b>: <q>{html.escape(text)}</q></p>"
    return f'<div class="example">{about}\n{html_table(header, rows)}</div>'


_GOES_ON = "How the text goes on, and how each run does, by the most likely token each time."
_FILLS = (
    "At each place that is predicted: the token of the text, and the one that each run finds most "
    "likely, with its probability and, where it is another one, that of the token of the text."
)
_STYLE = """<style>
.example { margin: 1rem 0 1.5rem; }
.example q, .example td { white-space: pre-wrap; overflow-wrap: anywhere; }
.example td { text-align: left; vertical-align: top; }
.example th { text-align: left; }
</style>"""
