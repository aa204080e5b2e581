"""fairseq's ``dict.txt`` over GPT-2's byte-level BPE, as a HuggingFace tokenizer.

The symbols of such a dictionary are GPT-2's token numbers written as text. Ids: ``<s>`` 0,
``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, the lines from 4 on, and ``<mask>`` behind them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, RobertaTokenizer

from dskd.data.foreign import raised_as
from dskd.data.tokenizers import special_ids, vocabulary_size
from dskd.errors import ConfigError

ROBERTA_SHA256 = "6e8b8d26dcc24d72cd5094c4b3d6d5e50cfb48e0cfc9bd1db1588620a41e3a91"
"""Of the public RoBERTa's tokens in the order of their ids, joined by line ends."""

_FIRST = ("<s>", "<pad>", "</s>", "<unk>")
_MASK = "<mask>"
_END_OF_TEXT = "<|endoftext|>"
_MADE_UP = re.compile(r"madeupword\d+")
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_OVERWRITE = "#fairseq:overwrite"

Merges = Sequence[tuple[str, str]]


def read_dictionary(path: Path) -> list[str]:
    """The symbols of a ``dict.txt``, in the order of its lines.

    Raises:
        ConfigError: it cannot be read, a line is no symbol with a count or has a symbol that came
            before, or it is no dictionary of GPT-2's BPE; names the line.
    """
    symbols: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        symbol, space, count = line.rpartition(" ")
        if count == _OVERWRITE:
            raise ConfigError(
                f"{path}, line {number}: it overwrites {symbol.rpartition(' ')[0]!r}; a "
                "HuggingFace vocabulary has one id for a token"
            )
        if not (space and symbol and _NUMBER.fullmatch(count)):
            raise ConfigError(f"{path}, line {number}: {line[:60]!r} is no symbol with a count")
        if symbol in symbols or symbol in _FIRST:
            before = f"line {symbols[symbol]}" if symbol in symbols else "every dictionary"
            raise ConfigError(f"{path}, line {number}: {symbol!r} is in {before} already")
        if not (_NUMBER.fullmatch(symbol) or _MADE_UP.fullmatch(symbol)):
            raise ConfigError(
                f"{path}, line {number}: {symbol!r} is no number of a token: not a GPT-2 BPE "
                "dictionary (words and SentencePiece pieces are not converted)"
            )
        symbols[symbol] = number
    if not symbols:
        raise ConfigError(f"{path} is empty")
    return list(symbols)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a ``vocab.bpe``, in their order.

    Raises:
        ConfigError: it cannot be read, or a line is no pair; names the line.
    """
    merges = []
    for number, line in enumerate(_lines(path), 1):
        if number == 1 and line.startswith("#version"):
            continue
        first, _, second = line.partition(" ")
        if not (first and second) or " " in second:
            raise ConfigError(f"{path}, line {number}: {line[:60]!r} is no merge of two tokens")
        merges.append((first, second))
    return merges


def tokens_in_order(symbols: Sequence[str], merges: Merges, where: str) -> list[str]:
    """The token of every id, ``<mask>`` last.

    Raises:
        ConfigError: a symbol is beyond the merges; it is named.
    """
    bpe = [*_byte_characters(), *("".join(pair) for pair in merges), _END_OF_TEXT]
    for symbol in symbols:
        if _NUMBER.fullmatch(symbol) and int(symbol) >= len(bpe):
            raise ConfigError(
                f"{where}: symbol {symbol} is beyond the {len(merges)} merges of its BPE, whose "
                f"last number is {len(bpe) - 1}: another BPE made this dictionary"
            )
    own = [bpe[int(s)] if _NUMBER.fullmatch(s) else s for s in symbols]
    return [*_FIRST, *own, _MASK]


def is_robertas_own(tokens: Sequence[str]) -> bool:
    """Whether tokens in the order of their ids are those of the public RoBERTa."""
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest() == ROBERTA_SHA256


def tokenizer_of(symbols: Sequence[str], merges: Merges, where: str) -> RobertaTokenizer:
    """The tokenizer that encodes as fairseq's BPE and dictionary do together.

    Raises:
        ConfigError: a symbol is beyond the merges, or the dictionary lacks tokens that they make.
    """
    tokens = tokens_in_order(symbols, merges, where)
    ids = {token: index for index, token in enumerate(tokens)}
    made = [*_byte_characters(), *("".join(pair) for pair in merges)]
    lacking = [(number, token) for number, token in enumerate(made) if token not in ids]
    if lacking:
        number, token = lacking[0]
        raise ConfigError(
            f"{where} lacks {len(lacking)} tokens of its BPE, the first is {number} ({token!r}): "
            "fairseq makes <unk> of them after merging, which no HuggingFace tokenizer does"
        )
    # As fairseq fills masks: the space before one is part of it.
    mask = AddedToken(_MASK, lstrip=True, normalized=False, special=True)
    return RobertaTokenizer(vocab=ids, merges=list(merges), mask_token=mask)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, symbols: Sequence[str], name: str, where: str
) -> list[str]:
    """Make sure that a tokenizer has the dictionary's tokens at the dictionary's ids; returns
    these. Behind them it may have special tokens of its own (ELLE's domains).

    Args:
        tokenizer: of byte-level BPE.
        name, where: what names tokenizer and dictionary, for messages.

    Raises:
        ConfigError: it is no BPE, or differs; names the first id that does.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"{name} is a {model['type']}, not a GPT-2 BPE")
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens = tokens_in_order(symbols, pairs, where)
    theirs = {index: token for token, index in tokenizer.get_vocab().items()}
    for index, token in enumerate(tokens):
        if theirs.get(index) != token:
            raise ConfigError(
                f"id {index} is {token!r} in {where}, {theirs.get(index)!r} in {name}"
            )
    special_V = special_ids(tokenizer)
    for index in range(len(tokens), vocabulary_size(tokenizer)):
        if not special_V[index]:
            raise ConfigError(f"id {index} is {theirs.get(index)!r} in {name} only, not in {where}")
    return tokens


def _byte_characters() -> list[str]:
    """The character of each of GPT-2's numbers 0 to 255: bytes that print, then the others."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printing] + [chr(256 + k) for k in range(256 - len(printing))]


def _lines(path: Path) -> list[str]:
    with raised_as(ConfigError, f"{path}: cannot be read"):
        text = path.read_bytes().decode("utf-8")
    # Not splitlines(): a token may hold a character that Unicode calls a line's end.
    return text.rstrip("\r\n").replace("\r\n", "\n").split("\n") if text.strip() else []
