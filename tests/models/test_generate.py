"""Generation: what HuggingFace's own ``generate`` takes greedily, draws as the distribution says,
and samples that depend on their number alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dskd.engine.engine import shard_teacher
from dskd.errors import NonFiniteError
from dskd.models.generate import Decoding, Sampling, continuations, with_noise
from tests.models import tiny
from tests.ranks import run_ranks
from tests.training.waits import HostWaits

FAMILIES = ["gpt2", "llama", "qwen3"]
PROMPTS = [[5 + (3 * row + k) % 37 for k in range(1 + 5 * row % 11)] for row in range(32)]
"""Of 1 to 11 tokens."""
DECODING = Decoding(longest=14, positions=32, vocabulary=43, ends=tuple(range(2, 43, 8)), pad=1)
DRAWN = replace(DECODING, sampling=Sampling(seed=3, top_k=8, temperature=0.7))


def model_of(family: str, **kw):
    return tiny.make(family, initializer_range=0.3, **kw)


def go_on(model, decoding, prompts=None, batch=7, numbers=None, **kw):
    prompts = PROMPTS if prompts is None else prompts
    numbers = range(len(prompts)) if numbers is None else numbers
    return continuations(model, prompts, decoding, numbers=numbers, batch=batch, **kw)


@torch.no_grad()
def loop(model, prompt: list[int], decoding: Decoding) -> list[int]:
    """One token at a time, each by a pass over all of the row, until an end comes or the row is
    full: the rule by which the original's decoding stops."""
    row = list(prompt)
    while len(row) < min(decoding.positions, len(prompt) + decoding.longest):
        logits_V = model.eval()(input_ids=torch.tensor([row])).logits[0, -1]
        row.append(int(logits_V.argmax()))
        if row[-1] in decoding.ends:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_makes_of_each_prompt_alone(family):
    model = model_of(family).eval()
    found = go_on(model, DECODING)
    for prompt, new in zip(PROMPTS, found, strict=True):
        alone = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=list(DECODING.ends),
            pad_token_id=1,
        )
        assert new == alone[0, len(prompt) :].tolist()
    assert len({len(new) for new in found}) > 2  # some end by themselves, at different lengths
    assert all(len(new) == 14 or new[-1] in DECODING.ends for new in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_stops_at_its_end_or_where_the_positions_do(family):
    """Prompts that leave room for 14, 7 and 1 tokens, side by side."""
    model = model_of(family)
    rows = [prompt * 31 for prompt in ([5], [11], [17], [23], [30], [36])]
    prompts = [row[: (3, 25, 31)[place % 3]] for place, row in enumerate(rows)]
    found = go_on(model, DECODING, prompts, batch=6)
    assert found == [loop(model, prompt, DECODING) for prompt in prompts]
    endless = replace(DECODING, ends=())
    found = go_on(model, endless, prompts, batch=6)
    assert [len(new) for new in found] == [14, 7, 1, 14, 7, 1]
    assert found == [loop(model, prompt, endless) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_a_function_of_its_number_alone(family):
    model = model_of(family)
    wanted = go_on(model, DRAWN, batch=32)
    for batch in (1, 7):
        assert go_on(model, DRAWN, batch=batch) == wanted
    places = [30, 4, 17]
    some = go_on(model, DRAWN, [PROMPTS[p] for p in places], numbers=places)
    assert some == [wanted[p] for p in places]
    assert go_on(model, DRAWN, numbers=range(100, 132)) != wanted
    other = replace(DRAWN, sampling=replace(DRAWN.sampling, seed=4))
    assert sum(a == b for a, b in zip(go_on(model, other), wanted, strict=True)) < 5


FEW = [*PROMPTS[:12], [8] * 29]
"""Three batches of 5, and one whose row has little room."""


def _on_a_rank(rank: int, family: str, sharded: bool) -> list:
    ds = tiny.zero3(2) if sharded else None
    model = model_of(family, ds=ds).requires_grad_(False)
    if sharded:
        shard_teacher(model, ds)
    return [go_on(model, decoding, FEW, batch=5) for decoding in (DECODING, DRAWN)]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "ZeRO-3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_and_sharding_makes_the_same(family, sharded):
    """A rank is idle in two of the three rounds, and in one it ends earlier than the other."""
    model = model_of(family)
    wanted = [go_on(model, decoding, FEW) for decoding in (DECODING, DRAWN)]
    assert run_ranks(_on_a_rank, family, sharded) == [wanted, wanted]


def _shares(drawn_B: torch.Tensor, columns: int) -> np.ndarray:
    return np.bincount(drawn_B.numpy(), minlength=columns)


@pytest.mark.parametrize("top_k", [6, None])
def test_draws_are_distributed_as_the_softmax(top_k):
    """Chi-square over 40,000 draws; beyond its 0.9999 quantile would be a defect."""
    draws, columns = 40_000, 16
    generator = torch.Generator().manual_seed(1)
    logits_V = torch.randn(columns, generator=generator) * 2
    keys_B = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, draws))
    sampling = Sampling(seed=0, top_k=top_k, temperature=1.5)
    noised_BV = with_noise(logits_V.repeat(draws, 1), keys_B, sampling)
    counts_V = _shares(noised_BV.argmax(1), columns)
    kept_V = logits_V >= logits_V.sort(descending=True).values[(top_k or columns) - 1]
    wanted_V = draws * (logits_V / 1.5).where(kept_V, -torch.inf).softmax(0).numpy()
    assert not counts_V[~kept_V.numpy()].any()
    expected = wanted_V[kept_V.numpy()]
    chi_square = ((counts_V[kept_V.numpy()] - expected) ** 2 / expected).sum()
    assert chi_square < {6: 25.7, None: 44.3}[top_k]  # of 5 and 15 degrees of freedom


def test_samples_of_a_model_are_distributed_as_it_says():
    """The first two tokens of 4,000 samples of one prompt: pairs, so that draws at two places of
    a sample have nothing in common."""
    model = tiny.make("gpt2", initializer_range=0.1)
    decoding = replace(DECODING, ends=(), longest=2, sampling=Sampling(seed=1, top_k=3))
    found = go_on(model, decoding, [[7, 8]] * 4000, batch=2000)
    with torch.no_grad():
        first_K = model.eval()(torch.tensor([[7, 8]])).logits[0, -1].topk(3)
        rows = torch.tensor([[7, 8, int(token)] for token in first_K.indices])
        second_KK = model(rows).logits[:, -1].topk(3)
    wanted, counts = [], []
    for a, p in enumerate(first_K.values.softmax(0)):
        for b, q in enumerate(second_KK.values[a].softmax(0)):
            wanted.append(4000 * float(p * q))
            counts.append(found.count([int(first_K.indices[a]), int(second_KK.indices[a, b])]))
    assert sum(counts) == 4000
    chi_square = sum((n - w) ** 2 / w for n, w in zip(counts, wanted, strict=True))
    assert chi_square < 31.8  # the 0.9999 quantile of 8 degrees of freedom


def test_which_tokens_count_is_as_in_the_original():
    """Tokens as likely as the k-th stay. Their share of many draws, against the probabilities."""
    cases = json.loads(Path("tests/golden/l2kd_topk.json").read_text())
    (case,) = cases["cases"]
    inputs, draws = case["inputs"], 50_000
    sampling = Sampling(seed=0, top_k=inputs["k"], temperature=inputs["temperature"])
    for logits, expected in zip(inputs["logits"], case["expected"], strict=True):
        keys_B = torch.from_numpy(np.random.default_rng(5).integers(-(2**63), 2**63, draws))
        noised_BV = with_noise(torch.tensor(logits).repeat(draws, 1), keys_B, sampling)
        kept_V = noised_BV[0].isfinite()
        own_V = (torch.tensor(logits, dtype=torch.float64) / inputs["temperature"]).where(
            kept_V, -torch.inf
        )
        assert own_V.softmax(0).tolist() == pytest.approx(expected, abs=case["tol"])
        shares_V = _shares(noised_BV.argmax(1), len(logits)) / draws
        assert shares_V.tolist() == pytest.approx(expected, abs=0.01)


def test_the_model_is_as_it_was_and_its_folders_wishes_do_not_count():
    model = model_of("llama").train()
    wanted = go_on(model, DECODING)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.max_length = 5.0, True, 3
    assert go_on(model, DECODING) == wanted
    assert model.generation_config is own and own.repetition_penalty == 5.0
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("decoding", [DECODING, DRAWN], ids=["greedy", "drawn"])
def test_only_what_the_tokenizer_has_is_chosen(decoding):
    """Of a model whose vocabulary is padded."""
    settings = tiny.settings("llama", initializer_range=0.3)
    model = tiny.make(settings.model_copy(update={"vocab_multiple": 64}))
    largest = [
        max(max(new) for new in go_on(model, replace(decoding, vocabulary=size, ends=())))
        for size in (64, 43)
    ]
    assert largest[0] >= 43 > largest[1]


def test_progress_counts_prompts():
    seen = []
    prompts = [*PROMPTS[:9], [8] * 30]
    go_on(model_of("gpt2"), DECODING, prompts, 4, progress=lambda *n: seen.append(n))
    assert seen == [(4, 10), (8, 10), (9, 10), (10, 10)]
    assert go_on(model_of("gpt2"), DECODING, []) == []


def _broken_on_one_rank(rank: int) -> str:
    ds = tiny.zero3(2)
    model = model_of("gpt2", ds=ds).requires_grad_(False)
    shard_teacher(model, ds)
    if rank == 1:  # what it alone computes
        model.transformer.ln_f.register_forward_hook(lambda *parts: parts[-1] * torch.nan)
    with pytest.raises(NonFiniteError) as found:
        go_on(model, DECODING, PROMPTS[:3], batch=1, numbers=[11, 12, 13])
    return str(found.value)


def test_logits_that_are_not_finite_are_refused_by_number():
    model = model_of("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[PROMPTS[2][0]] = torch.inf
    with pytest.raises(NonFiniteError, match="logits are not finite in sample 42"):
        go_on(model, DECODING, PROMPTS[2:3], numbers=[42])


def test_such_logits_of_one_rank_are_refused_on_all():
    """When the passes are made that the other rank expects."""
    (first, second) = run_ranks(_broken_on_one_rank)
    assert first == second
    assert first.startswith("the model's logits are not finite in sample")


@pytest.mark.parametrize("decoding", [DECODING, DRAWN], ids=["greedy", "drawn"])
def test_the_host_waits_for_each_batch_and_for_no_token(decoding):
    """In dskd's own lines; ``generate`` itself looks after each token whether all rows ended."""
    model = model_of("llama")
    counts = []
    for longest in (2, 12):
        with HostWaits() as waits:
            waits.put(model.parameters())
            go_on(model, replace(decoding, longest=longest, ends=()), batch=8)
        counts.append(waits.lines)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= 2 * 4  # the tokens, and whether all were finite
