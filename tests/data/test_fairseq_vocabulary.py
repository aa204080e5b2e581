"""``dict.txt`` and GPT-2's BPE together: fairseq's ids of texts, and what is no such dictionary."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer, RobertaTokenizer

from dskd.convert import fairseq
from dskd.data.fairseq_vocabulary import (
    is_robertas_own,
    read_dictionary,
    read_merges,
    tokenizer_of,
    tokens_in_order,
)
from dskd.errors import ConfigError
from tests.convert.checkpoints import GOLDEN, LAST, arguments, random_roberta, save

BPE, DICT = GOLDEN / "bpe/vocab.bpe", GOLDEN / "bpe/dict.txt"
PUBLIC = Path(__file__).parents[3] / "shared/data/roberta_vocabulary"
SIZES = {"L": 1, "H": 6, "F": 8, "P": 30}


def tokenizer() -> RobertaTokenizer:
    return tokenizer_of(read_dictionary(DICT), read_merges(BPE), "dict.txt")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a model with the golden dictionary, and further rows."""

    def make(further=0):
        state = random_roberta(SIZES | {"V": 273 + further}, seed=1)
        return save(tmp_path / "a.pt", {"model": state, "args": arguments()})

    return make


def test_the_vocabulary_is_fairseqs():
    wanted = json.loads((GOLDEN / "bpe/expected_vocab.json").read_text())
    assert len(wanted) == 273
    assert tokenizer().get_vocab() == wanted


def test_texts_become_fairseqs_ids(tmp_path):
    """Recorded from its encoder and dictionary; also after saving and loading."""
    tokenizer().save_pretrained(tmp_path)
    cases = json.loads((GOLDEN / "bpe/expected_encoding.json").read_text())
    assert len(cases) == 6
    for found in (tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        for case in cases:
            # fairseq encodes a line without the spaces around it, and begins no row with <s>.
            ids = found(case["text"])["input_ids"]
            assert ids == [0, *case["ids"]], case["text"]
        pair = found("a", "b")["input_ids"]
        a, b = found.convert_tokens_to_ids(["a", "b"])
        assert pair == [0, a, 2, 2, b, 2]
        the, s = found.convert_tokens_to_ids(["\u0120the", "\u0120s"])
        assert found(" the <mask> s")["input_ids"] == [0, the, 272, s, 2]


def test_a_tokenizer_in_place_of_merges(tmp_path, checkpoint):
    folder = str(tmp_path / "hf")
    tokenizer().save_pretrained(folder)
    found = fairseq.convert(checkpoint(), dictionary=DICT, tokenizer=folder).tokenizer
    assert found.get_vocab() == tokenizer().get_vocab()
    further = tokenizer()
    further.add_tokens(["<WB>", "<bio>"], special_tokens=True)  # as ELLE has them, behind all
    further.save_pretrained(folder)
    converted = fairseq.convert(checkpoint(2), dictionary=DICT, tokenizer=folder)
    assert converted.tokenizer.convert_tokens_to_ids("<bio>") == 274
    assert converted.notes == ["vocabulary: 275 tokens, as many as embeddings"]
    with pytest.raises(ConfigError, match=r"of 273 tokens; .* makes 275 .* and 2 of --tokenizer"):
        fairseq.convert(checkpoint(), dictionary=DICT, tokenizer=folder)


def test_another_order_is_refused_by_its_first_id(tmp_path, checkpoint):
    vocab = tokenizer().get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens[40], tokens[50] = tokens[50], tokens[40]
    swapped = {token: index for index, token in enumerate(tokens)}
    RobertaTokenizer(vocab=swapped, merges=read_merges(BPE)).save_pretrained(tmp_path / "hf")
    message = f"id 40 is {tokens[50]!r} in .*dict.txt, {tokens[40]!r} in --tokenizer"
    with pytest.raises(ConfigError, match=message):
        fairseq.convert(checkpoint(), dictionary=DICT, tokenizer=str(tmp_path / "hf"))


def test_a_tokenizer_of_another_kind_or_with_more_text(tmp_path, checkpoint):
    folder = str(tmp_path / "hf")
    BertTokenizer(vocab={"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3}).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"--tokenizer .*hf is a WordPiece, not a GPT-2 BPE"):
        fairseq.convert(checkpoint(), dictionary=DICT, tokenizer=folder)
    further = tokenizer()
    further.add_tokens(["word"])
    further.save_pretrained(folder)
    message = r"id 273 is 'word' in --tokenizer .*hf only, not in .*dict.txt"
    with pytest.raises(ConfigError, match=message):
        fairseq.convert(checkpoint(1), dictionary=DICT, tokenizer=folder)


def test_the_wrong_dictionary_names_both_numbers():
    message = r"has embeddings of 46 tokens; .*dict.txt makes 273 \(4 special, 268 lines, <mask>\)"
    with pytest.raises(ConfigError, match=message):
        fairseq.convert(LAST, dictionary=DICT, bpe=BPE)


def test_a_dictionary_alone_is_checked():
    converted = fairseq.convert(LAST, dictionary=GOLDEN / "fairseq_2019/dict.txt")
    assert converted.tokenizer is None
    assert converted.notes == ["neither --bpe nor --tokenizer: no tokenizer is written"]


def test_a_dictionary_that_lacks_tokens_of_its_bpe():
    message = r"lacks \d+ tokens of its BPE, the first is 0 \('!'\)"
    with pytest.raises(ConfigError, match=message):
        tokenizer_of(["13", "64"], read_merges(BPE), "dict.txt")


def test_a_symbol_beyond_the_merges():
    assert tokens_in_order(["266"], read_merges(BPE), "d")[4] == "<|endoftext|>"
    with pytest.raises(ConfigError, match=r"symbol 267 is beyond the 10 merges .* number is 266"):
        tokens_in_order(["267"], read_merges(BPE), "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13 5\nthe 4\n", "line 2: 'the' is no number of a token: not a GPT-2 BPE dictionary"),
        ("\u2581the 4\n", "line 1: .* not a GPT-2 BPE dictionary"),
        ("13 5\n14\n", "line 2: '14' is no symbol with a count"),
        ("13 x\n", "line 1: '13 x' is no symbol with a count"),
        ("13 5\n\n14 2\n", "line 2: '' is no symbol with a count"),
        ("13 5\n14 2\n13 1\n", "line 3: '13' is in line 1 already"),
        ("<pad> 5\n", "line 1: '<pad>' is in every dictionary already"),
        ("13 5 #fairseq:overwrite\n", "line 1: it overwrites '13'"),
        ("", "is empty"),
        (b"\xff 3\n", "cannot be read"),
    ],
)
def test_what_is_no_dictionary(tmp_path, text, message):
    path = tmp_path / "dict.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        read_dictionary(path)


@pytest.mark.parametrize("line", ["a", "a b c", "a ", " b", ""])
def test_what_is_no_merge(tmp_path, line):
    path = tmp_path / "vocab.bpe"
    path.write_text(f"#version: 0.2\nh e\n{line}\nh i\n")
    with pytest.raises(ConfigError, match=r"line 3: .* is no merge of two tokens"):
        read_merges(path)


def test_options_that_contradict_each_other():
    with pytest.raises(ConfigError, match="--dict: needed with --bpe or --tokenizer"):
        fairseq.convert(LAST, bpe=BPE)
    with pytest.raises(ConfigError, match="--bpe and --tokenizer: one of them"):
        fairseq.convert(LAST, dictionary=DICT, bpe=BPE, tokenizer="x")


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="no ../shared/data/roberta_vocabulary")
def test_the_public_vocabulary_is_robertas(tmp_path):
    for name, file in (("dict.txt", "dict.txt.gz"), ("vocab.bpe", "merges.txt.gz")):
        (tmp_path / name).write_bytes(gzip.decompress((PUBLIC / file).read_bytes()))
    symbols, merges = read_dictionary(tmp_path / "dict.txt"), read_merges(tmp_path / "vocab.bpe")
    tokens = tokens_in_order(symbols, merges, "dict.txt")
    assert (len(symbols), len(merges), len(tokens)) == (50260, 50000, 50265)
    assert is_robertas_own(tokens)
    tokens[5], tokens[6] = tokens[6], tokens[5]
    assert not is_robertas_own(tokens)
    found = tokenizer_of(symbols, merges, "dict.txt")
    text = "Hello world! c\u00e9c\u00e9 herlolip"
    wanted = [0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2]
    assert found(text)["input_ids"] == wanted
    assert found("a", "b")["input_ids"] == [0, 102, 2, 2, 428, 2]
    state = random_roberta(SIZES | {"V": 50265}, seed=1)
    path = save(tmp_path / "a.pt", {"model": state, "args": arguments()})
    files = {"dictionary": tmp_path / "dict.txt", "bpe": tmp_path / "vocab.bpe"}
    notes = fairseq.convert(path, dtype=torch.float16, **files).notes
    assert notes[-1].endswith(
        "50265 tokens, as many as embeddings, the order of the public RoBERTa"
    )
