"""How many bytes of text rows stand for: counted from the text, the same for every vocabulary."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dskd.data import sources
from dskd.data.prepared import Prepared, open_prepared, prepare, prepare_further, what_was_read
from dskd.data.preparing import _held_out
from dskd.data.tokenizers import start_id, vocabulary_size
from dskd.data.views import CausalView
from dskd.errors import DataError
from dskd.methods.lm import LanguageModelling
from dskd.methods.metrics import LM_LOSS
from dskd.settings.data import Data, PretrainedTokenizer, TextSource, TrainedTokenizer
from dskd.system.files import read_manifest, write_manifest
from dskd.training.evaluation import EvaluationSet, evaluate
from dskd.training.objective import Objective
from tests.data.conftest import WORDS, make_corpus, settings

BYTES = "bytes"
"""A tokenizer without merges and without a start token."""
ENDS = ("</s>", "<unk>")


def tokenizer_of(folder: Path, model: object, bytewise: bool = False) -> PretrainedTokenizer:
    """Settings of a tokenizer with an end token."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bytewise:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    made.save_pretrained(folder)
    return PretrainedTokenizer(kind="pretrained", path=str(folder))


def byte_model(but: str = "", **more: str) -> models.BPE:
    letters = [
        letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in but
    ]
    return models.BPE({t: i for i, t in enumerate([*ENDS, *letters])}, [], **more)


def causal(where: Path, **changes: object) -> Data:
    """Of two domains; the second one's text is Greek, Chinese and emoji."""
    make_corpus(where / "corpus.txt")
    others = [f"\u03b1\u03b2\u03b3 {n}\n\u4e2d\u6587 \U0001f600{n % 7} end" for n in range(40)]
    (where / "more.txt").write_text("\n\n".join(others), encoding="utf-8")
    both = [
        TextSource(kind="text", path=str(where / f"{name}.txt"), domain=name)
        for name in ("corpus", "more")
    ]
    own = {"objective": "causal", "sources": both, "packing": "contiguous"}
    return settings(where, **(own | changes))


def held_out(data: Data) -> dict[str, list[str]]:
    """The documents of validation by domain, read apart."""
    return {
        source.domain: [
            text
            for text in sources.documents(source, int, int)
            if _held_out(text, data.validation_fraction)
        ]
        for source in data.sources
    }


def size_of(*texts: list[str]) -> int:
    """Bytes of all of them."""
    return len("".join(text for some in texts for text in some).encode())


@pytest.mark.parametrize("packing", ["contiguous", "complete", "complete_doc"])
@pytest.mark.parametrize("size", [BYTES, 300, 600])
def test_all_bytes_of_the_validation_documents_count(tmp_path, packing, size):
    """Whatever the tokens are and however they are packed; the end tokens are tokens, too."""
    data = causal(tmp_path, packing=packing)
    trained = TrainedTokenizer(vocab_size=size) if size != BYTES else None
    tokenizer = trained or tokenizer_of(tmp_path / "own", byte_model(), bytewise=True)
    data = data.model_copy(update={"tokenizer": tokenizer})
    rows = open_prepared(prepare(data)).validation
    wanted = held_out(data)
    assert rows.text.domains.keys() == wanted.keys() == {"corpus", "more"}
    for name, texts in wanted.items():
        assert rows.text.domains[name].bytes == size_of(texts)
        if size == BYTES:
            tokens = rows.text.domains[name].bytes + len(texts)
            assert rows.text.domains[name].tokens == tokens
    assert rows.text.whole.tokens == rows.tokens - (0 if size == BYTES else len(rows))
    assert (
        rows.text.fingerprint
        == open_prepared(prepare(causal(tmp_path))).validation.text.fingerprint
    )


def test_other_documents_have_another_fingerprint(tmp_path):
    data = causal(tmp_path)
    first = open_prepared(prepare(data)).validation.text
    other = open_prepared(prepare(data.model_copy(update={"validation_fraction": 0.21})))
    assert other.validation.text.fingerprint != first.fingerprint
    turned = data.model_copy(update={"sources": data.sources[::-1]})
    assert open_prepared(prepare(turned)).validation.text.fingerprint != first.fingerprint


def uniform(prepared: Prepared) -> GPT2LMHeadModel:
    """A model that knows nothing."""
    size = vocabulary_size(prepared.tokenizer)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("size", [BYTES, 300, 2048])
def test_a_uniform_model_takes_log2_of_the_vocabulary_for_each_token(tmp_path, size):
    """Also by domain, and with the bytes of the whole text where rows have no start token; not on
    a part of the rows."""
    data = causal(tmp_path)
    trained = TrainedTokenizer(vocab_size=size) if size != BYTES else None
    tokenizer = trained or tokenizer_of(tmp_path / "own", byte_model(), bytewise=True)
    data = data.model_copy(update={"tokenizer": tokenizer})
    prepared = open_prepared(prepare(data))
    rows = prepared.validation
    assert (start_id(prepared.tokenizer, "causal") is None) == (size == BYTES)
    objective = Objective(uniform(prepared), LanguageModelling(kind="lm"), None)
    each = EvaluationSet("eval", rows, CausalView(), None, domains=prepared.domains, text=rows.text)
    how = {"micro_batch": 16, "device": torch.device("cpu")}
    found = evaluate(objective, [each], [LM_LOSS], **how)
    bits = np.log2(vocabulary_size(prepared.tokenizer))
    whole = rows.text.whole
    assert found["eval"]["bits_per_byte"] == pytest.approx(whole.tokens * bits / whole.bytes, 1e-6)
    for name, text in rows.text.domains.items():
        wanted = text.tokens * bits / text.bytes
        assert found[f"eval.{name}"]["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    predicted = rows.tokens - len(rows)
    assert found["eval"]["tokens"] == predicted
    if size != BYTES:  # every token is predicted
        assert predicted == whole.tokens
    part = EvaluationSet("eval", rows, CausalView(), len(rows) - 1, text=rows.text)
    assert "bits_per_byte" not in evaluate(objective, [part], [LM_LOSS], **how)["eval"]


def told(data: Data, prepared: Prepared) -> str:
    assert prepared.validation.text is None
    return what_was_read(prepared.folder)[-1]


def test_where_the_unknown_token_hides_text_nothing_is_known(tmp_path):
    words = models.WordLevel({t: i for i, t in enumerate([*ENDS, *WORDS])}, "<unk>")
    data = causal(tmp_path, tokenizer=tokenizer_of(tmp_path / "own", words))
    prepared = open_prepared(prepare(data))
    unknown = (prepared.validation._ids == 1).sum()
    line = f"  no bits per byte: {unknown} tokens are the unknown token, which hides text"
    assert unknown and told(data, prepared) == line
    ascii_only = data.model_copy(update={"sources": data.sources[:1]})
    rows = open_prepared(prepare(ascii_only)).validation
    assert rows.text.whole.bytes == size_of(*held_out(ascii_only).values())


def test_the_end_tokens_of_documents_hide_nothing(tmp_path):
    """Of a tokenizer that has one token for both, as some of GPT-2's kind."""
    own = byte_model(unk_token="</s>")
    data = causal(tmp_path, tokenizer=tokenizer_of(tmp_path / "own", own, bytewise=True))
    rows = open_prepared(prepare(data)).validation
    assert rows.text.whole.bytes == size_of(*held_out(data).values())
    lacking = byte_model(but="\u00ce", unk_token="</s>")  # the first byte of alpha
    data = causal(tmp_path, tokenizer=tokenizer_of(tmp_path / "less", lacking, bytewise=True))
    greek = len(held_out(data)["more"]) * 3
    line = f"  no bits per byte: {greek} tokens are the unknown token, which hides text"
    assert told(data, open_prepared(prepare(data))) == line


def test_a_tokenizer_that_leaves_letters_out(tmp_path):
    lacking = byte_model(but="\u00ce")
    data = causal(tmp_path, tokenizer=tokenizer_of(tmp_path / "own", lacking, bytewise=True))
    line = "  no bits per byte: the tokenizer leaves out what it has no token for"
    assert told(data, open_prepared(prepare(data))) == line


def test_tokens_that_are_in_no_row(tmp_path):
    """A row of one token is none of ``complete_doc``."""
    (tmp_path / "corpus.txt").write_text("\n".join(f"\n{n:031d}" for n in range(40)))
    own = tokenizer_of(tmp_path / "own", byte_model(), bytewise=True)
    source = TextSource(kind="text", path=str(tmp_path / "corpus.txt"), per="line")
    (tmp_path / "held.txt").write_text("\n" + "x" * 31)
    held = TextSource(kind="text", path=str(tmp_path / "held.txt"), per="file")
    about = {"objective": "causal", "tokenizer": own, "packing": "complete_doc"}
    data = settings(tmp_path, **about, sources=[source], validation=[held])
    line = "  no bits per byte: data.packing leaves 1 tokens out of the rows"
    assert told(data, open_prepared(prepare(data))) == line


def test_further_rows_and_what_is_said(tmp_path):
    data = causal(tmp_path)
    beside = open_prepared(prepare(data))
    size = beside.validation.text.whole.bytes
    assert what_was_read(beside.folder)[-1] == f"  {size:,} bytes to evaluate on"
    folder = prepare_further(data, data.sources[1:], beside)
    size = len((tmp_path / "more.txt").read_bytes()) - 2 * 39  # blank lines between documents
    assert what_was_read(folder)[-1] == f"  {size:,} bytes to evaluate on"
    masked = data.model_copy(update={"objective": "masked"})
    folder = prepare(masked)
    assert open_prepared(folder).validation.text is None and len(what_was_read(folder)) == 3


def test_rows_of_before_are_the_same_rows(tmp_path):
    """Without a number, and with a word about it."""
    data = causal(tmp_path)
    folder = prepare(data)
    opened = open_prepared(folder)
    manifest = read_manifest(folder / "manifest.json", AssertionError)
    texts = manifest.pop("texts")
    write_manifest(folder / "manifest.json", manifest)
    assert prepare(data) == folder
    older = open_prepared(folder)
    assert older.fingerprint == opened.fingerprint
    assert told(data, older).startswith("  no bits per byte: these rows were prepared before")
    text, other = texts["validation"], {"bytes": 1, "tokens": 1}
    for domains in ({}, {"x": {}}, {"x": other}):
        edited = {"texts": {"validation": text | {"domains": domains}}}
        write_manifest(folder / "manifest.json", manifest | edited)
        with pytest.raises(DataError, match=r"not as this dskd writes it: texts\.validation"):
            open_prepared(folder)
