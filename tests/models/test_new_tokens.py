"""Special tokens that a stored model is yet to get: their rows are drawn, all others stay."""

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from dskd.errors import ConfigError
from dskd.models.build import model_fingerprint
from dskd.models.configs import config_of
from dskd.settings.checks import model_problems
from dskd.settings.model import Model
from tests.models.test_initial import fingerprints
from tests.models.tiny import make, stored, tokenizer, zero3
from tests.ranks import run_ranks

FAMILIES = ["gpt2", "llama", "qwen3"]
OWN, NEW = 43, ["__ans__", "__up__", "__down__"]


def further(names=NEW, special: bool = True):
    """The tokenizer of the stored models, with tokens behind its own."""
    tok = tokenizer()
    tok.add_tokens([AddedToken(n, normalized=False, special=special) for n in names], special)
    return tok


def grown(chosen: Model, model_type: str, **more):
    chosen = chosen.model_copy(update={"new_tokens": True})
    return make(chosen, model_type=model_type, tok=more.pop("tok", None) or further(), **more)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_new_rows_are_of_the_seed_and_the_others_as_they_were(tmp_path, model_type, tied, capsys):
    chosen = stored(tmp_path, model_type, drift=True, tie_word_embeddings=tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    mine = grown(chosen, model_type, seed=7).eval()
    assert mine.config.vocab_size == OWN + 3
    assert (
        "random embeddings for the new tokens __ans__, __up__, __down__" in capsys.readouterr().out
    )
    states = theirs.state_dict()
    for name, value in mine.state_dict().items():
        rows = OWN if len(value) == OWN + 3 else len(value)
        assert torch.equal(value[:rows], states[name]), name
    ids = torch.arange(5, 16)[None]
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits[..., :OWN], theirs(ids).logits)
    embeddings = mine.get_input_embeddings().weight[OWN:].detach()
    assert embeddings.std().item() == pytest.approx(0.02, rel=0.3)
    assert abs(embeddings.mean().item()) < 0.01
    heads = mine.get_output_embeddings().weight[OWN:].detach()
    assert torch.equal(heads, embeddings) == tied
    again, other = (grown(chosen, model_type, seed=seed) for seed in (7, 8))
    assert fingerprints(again) == fingerprints(mine)
    assert not torch.equal(other.get_input_embeddings().weight[OWN:], embeddings)


def test_rows_that_pad_the_vocabulary_become_those_of_the_new_tokens(tmp_path):
    chosen = stored(tmp_path, "llama", drift=True, vocab_size=64)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    mine = grown(chosen, "llama").get_input_embeddings().weight
    assert mine.shape == theirs.shape
    kept = [*range(OWN), *range(OWN + 3, 64)]
    assert torch.equal(mine[kept], theirs[kept])
    assert mine[OWN : OWN + 3].abs().max() < 0.1 < theirs[OWN : OWN + 3].abs().max()


def _sharded(rank: int, folder: str):
    del rank
    return fingerprints(grown(Model(path=folder), "gpt2", ds=zero3(2)))


def test_a_sharded_model_is_the_same(tmp_path):
    whole = fingerprints(grown(stored(tmp_path, "gpt2"), "gpt2"))
    assert run_ranks(_sharded, str(tmp_path)) == [whole] * 2


def test_a_model_that_has_the_tokens_is_read_as_it_is(tmp_path):
    chosen = stored(tmp_path, "gpt2", tok=further(), vocab_size=OWN + 3)
    plain = fingerprints(make(chosen, model_type="gpt2", tok=further()))
    assert fingerprints(grown(chosen, "gpt2", seed=1)) == plain


def test_the_config_says_it_beforehand(tmp_path):
    chosen = stored(tmp_path, "gpt2").model_copy(update={"new_tokens": True})
    assert config_of(chosen, where="model", tokenizer=further()).vocab_size == OWN + 3
    assert config_of(chosen, where="model").vocab_size == OWN


def test_the_fingerprint_knows_the_seed_of_the_new_rows(tmp_path):
    chosen = stored(tmp_path, "gpt2")
    with_new = chosen.model_copy(update={"new_tokens": True})
    prints = {
        model_fingerprint(model, seed=seed, where="model")
        for model in (chosen, with_new)
        for seed in (1, 2)
    }
    assert len(prints) == 3


def test_without_the_setting_a_model_that_lacks_tokens_is_refused(tmp_path):
    chosen = stored(tmp_path, "gpt2")
    with pytest.raises(ConfigError) as caught:
        make(chosen, model_type="gpt2", tok=further())
    assert str(caught.value) == (
        f"model.path ({tmp_path}) lacks special tokens of the data's tokenizer: __ans__, __up__, "
        "__down__; a student gets embeddings for them by model.new_tokens: true"
    )


@pytest.mark.parametrize("tok", [further(special=False), tokenizer(45), tokenizer(43, swap=(9, 8))])
def test_other_tokens_make_another_vocabulary(tmp_path, tok):
    with pytest.raises(ConfigError, match="have different vocabularies"):
        grown(stored(tmp_path, "gpt2"), "gpt2", tok=tok)


def test_what_has_no_new_tokens_is_refused():
    given = Model(path="x", new_tokens=True)
    assert list(model_problems("model", given)) == []
    assert list(model_problems("teacher.model", given)) == [
        ("teacher.model.new_tokens", "only the student gets new embeddings (model.new_tokens)")
    ]
    random = Model(config={"model_type": "gpt2"}, new_tokens=True)
    told = "of a model with model.path; a random one has all tokens"
    assert list(model_problems("model", random)) == [("model.new_tokens", told)]
