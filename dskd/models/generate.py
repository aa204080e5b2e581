"""How a causal model goes on with prompts: many at a time, with a cache of keys and values.

HuggingFace's ``generate`` runs the model. A token is drawn as the most likely one once noise is
added to the logits (the Gumbel trick: Maddison, Tarlow and Minka, 2014), and the noise is a
function of (seed, number of the sample, place in it, token). So a sample depends neither on those
beside it nor on padding, ranks or ZeRO stage; in 16 bits only as far as their rounding leaves the
order of the logits.

Shape letters: B rows, T tokens of the longest prompt, L new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dskd.data.counter import mix
from dskd.engine.zero import is_sharded
from dskd.errors import NonFiniteError
from dskd.models.counter_dropout import finalised
from dskd.models.frozen import evaluating
from dskd.system import dist
from dskd.system.doing import next_one, pause

_DRAWS = 9  # stream of random numbers, apart from those of masks, rows, seeds and dropout
_STEP = int(mix(_DRAWS).astype(np.int64) | 1)
"""Odd number by which a key grows with the token's id."""
_SMALLEST, _LARGEST = 2.0**-53, 1.0 - 2.0**-24  # uniform numbers whose noise is finite in fp32
_AT_ONCE = 1 << 20
"""Logits whose random numbers exist at once, but at least those of a row: 8 bytes each."""


@dataclass(frozen=True)
class Sampling:
    """From which tokens one is drawn, and how likely each is.

    Attributes:
        seed: of all draws.
        top_k: the so many most likely tokens, and those that are as likely as the last of them;
            None: all.
        temperature: what the logits are divided by, above 0.
    """

    seed: int
    top_k: int | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and where a continuation ends.

    Attributes:
        longest: most new tokens of a row.
        positions: most tokens of a row, its prompt included.
        vocabulary: ids from this one on are never chosen: of a model with more rows of logits than
            its tokenizer has tokens.
        ends: ids that end a row.
        pad: id of padding, which no model sees.
        sampling: how tokens are drawn; None: the most likely one is taken.
    """

    longest: int
    positions: int
    vocabulary: int
    ends: tuple[int, ...]
    pad: int
    sampling: Sampling | None = None

    def room(self, prompt: Sequence[int]) -> int:
        """Most new tokens of a prompt; less than 1: it is too long."""
        return min(self.longest, self.positions - len(prompt))


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    numbers: Sequence[int],
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, on every rank; the ranks share the work (collective).

    A row's tokens stop with the first of ``decoding.ends``, which is then the last of them, or when
    there is no room for more. Nothing of the model's ``generation_config`` counts.

    Args:
        model: a causal LM, whole on each rank's device, or sharded by ZeRO-3.
        prompts: the same on every rank; ids, at least one each, with room for another.
        numbers: of each prompt's sample, in 63 bits: what is drawn is a function of it and of the
            seed.
        batch: most rows of a forward pass.
        progress: ``progress(done, total)`` is called with the numbers of prompts after each batch.

    Raises:
        NonFiniteError: logits are not finite; names the sample's number. On every rank.
    """
    assert len(numbers) == len(prompts), (len(numbers), len(prompts))
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    found: dict[int, list[int]] = {}
    done = 0
    bad: list[int] = []  # raised at the end: the others expect this rank's passes
    with evaluating(model):
        for places in _rounds(prompts, decoding, batch):
            mine = places[dist.rank()] if dist.rank() < len(places) else []
            # Under ZeRO-3 a rank without a batch makes passes for the others, of any row.
            taken = mine or places[0][: int(sharded)]
            if taken:
                rows, own = [prompts[place] for place in taken], [numbers[place] for place in taken]
                choice = _Choice(decoding, own, rows, next(model.parameters()).device)
                new = _generate(model, rows, decoding, choice, sharded)
                found |= zip(mine, new, strict=False)
                bad += choice.not_finite()
            done += sum(map(len, places))
            if progress is not None:
                progress(done, len(prompts))
    pause()
    with dist.agreed():
        if bad:
            raise NonFiniteError(f"the model's logits are not finite in sample {bad[0]}")
    whole = {place: ids for theirs in dist.gather_objects(found) for place, ids in theirs.items()}
    return [whole[place] for place in range(len(prompts))]


def _rounds(
    prompts: Sequence[Sequence[int]], decoding: Decoding, batch: int
) -> Iterator[list[list[int]]]:
    """Batches of places in ``prompts``, dealt out in rounds of one a rank.

    The rows of a round have room for equally many tokens. For a batch runs on until its last row
    has ended, under ZeRO-3 a round until its last batch has, and no row may leave the positions
    that the model has meanwhile.
    """

    def room(place: int) -> int:
        return decoding.room(prompts[place])

    # Rows of a length stand together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda place: (-room(place), len(prompts[place])))
    assert not order or room(order[-1]) > 0, "a prompt has no room for a token"
    for _, group in groupby(order, key=room):
        places = list(group)
        batches = [places[first : first + batch] for first in range(0, len(places), batch)]
        for first in range(0, len(batches), dist.world()):
            yield batches[first : first + dist.world()]


def _generate(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    decoding: Decoding,
    choice: _Choice,
    sharded: bool,
) -> list[list[int]]:
    """The new tokens of a batch of rows that have room for equally many."""
    device = next(model.parameters()).device
    width = max(map(len, rows))
    ids_BT = torch.tensor([[decoding.pad] * (width - len(row)) + [*row] for row in rows])
    mask_BT = torch.arange(width) >= width - torch.tensor([[len(row)] for row in rows])
    how = GenerationConfig(
        max_new_tokens=decoding.room(rows[0]),
        eos_token_id=list(decoding.ends) or None,
        pad_token_id=decoding.pad,
        do_sample=False,
    )
    with _configured(model, how):
        out_BT = model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.long().to(device),
            logits_processor=LogitsProcessorList([choice]),
            synced_gpus=sharded,
        )
    return [_ended(row, decoding.ends) for row in out_BT[:, width:].tolist()]


def _ended(row: list[int], ends: Sequence[int]) -> list[int]:
    """A row up to its end, without the padding behind it."""
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


@contextmanager
def _configured(model: PreTrainedModel, how: GenerationConfig) -> Iterator[None]:
    """Its ``generation_config`` is another one meanwhile: ``generate`` would fill what it is not
    told from that of the model's folder."""
    own = model.generation_config
    model.generation_config = how
    try:
        yield
    finally:
        model.generation_config = own


class _Choice(LogitsProcessor):
    """Adds what makes the most likely token a drawn one, and says that this rank gets on.

    Args:
        numbers: of the samples [B].
        rows: their prompts, which have room for equally many tokens.
        device: where the logits are.
    """

    def __init__(
        self,
        decoding: Decoding,
        numbers: Sequence[int],
        rows: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self._sampling, self._numbers = decoding.sampling, numbers
        self._vocabulary = decoding.vocabulary
        self._width = max(map(len, rows))
        self._bad_B = torch.zeros(len(numbers), dtype=torch.bool, device=device)
        if self._sampling is not None:
            keys_LB = _keys(self._sampling.seed, numbers, decoding.room(rows[0]))
            self._keys_LB = keys_LB.to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits [B, V] in fp32, their own memory, with noise."""
        next_one()
        self._bad_B |= ~scores.amax(1).isfinite()
        scores[:, self._vocabulary :] = -torch.inf
        if self._sampling is None:
            return scores
        return with_noise(scores, self._keys_LB[input_ids.shape[1] - self._width], self._sampling)

    def not_finite(self) -> list[int]:
        """The samples of which a logit was NaN or infinite."""
        bad_B = self._bad_B.tolist()
        return [number for number, bad in zip(self._numbers, bad_B, strict=True) if bad]


def _keys(seed: int, numbers: Sequence[int], room: int) -> Tensor:
    """A key for each place of each sample, int64 [L, B]."""
    keys_LB = mix(_DRAWS, seed, np.asarray(numbers), np.arange(room)[:, None])
    return torch.from_numpy(keys_LB.astype(np.int64))


def with_noise(logits_BV: Tensor, keys_B: Tensor, sampling: Sampling) -> Tensor:
    """Values [B, V] whose largest is at a token drawn by softmax(logits / temperature), of those
    that count; -inf at the others.

    Args:
        logits_BV: fp32; used up.
        keys_B: int64, of each row's draw.
    """
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        last_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV.masked_fill_(logits_BV < last_B1, -torch.inf)
    logits_BV /= sampling.temperature
    steps_V = torch.arange(logits_BV.shape[1], device=logits_BV.device) * _STEP
    rows = max(1, _AT_ONCE // logits_BV.shape[1])
    for first in range(0, len(logits_BV), rows):
        some = slice(first, first + rows)
        logits_BV[some] += _gumbel(finalised(keys_B[some, None] + steps_V))
    return logits_BV


def _gumbel(bits: Tensor) -> Tensor:
    """Noise of the standard Gumbel distribution in fp32, from random bits (int64), used up.

    By -log(-log(1 - u)): near 0, where what is drawn is decided, u has all its bits.
    """
    bits >>= 11
    bits &= (1 << 53) - 1
    uniform = (bits.float() * 2.0**-53).clamp_(_SMALLEST, _LARGEST)
    return uniform.neg_().log1p_().neg_().log_().neg_()
