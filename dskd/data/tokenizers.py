"""Tokenizers: trained on the run's own text or any fast HuggingFace one, compared by content.

Two vocabularies are the same when every id means the same token in both; their sizes tell nothing
(equal sizes with permuted tokens would train on garbage without any sign of it).

Shape letter: V, one entry for each id of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dskd.errors import ConfigError, DataError
from dskd.settings.data import Data, TrainedTokenizer
from dskd.system.files import fingerprint

_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0..3; <mask> comes last, as in RoBERTa
_MASK = "<mask>"
_TRAINING_CHARACTERS = 100_000_000  # more text hardly changes the merges
_SHOWN = 5
_BYTE_SPACES = ("\u0120", "\u0109", "\u010a", "\u010d")  # space, tab, line ends in byte-level BPE
_METASPACE = "\u2581"


def load_tokenizer(data: Data, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The run's tokenizer: trained on ``texts`` (at most their first 100 million characters), or
    the pretrained one that ``data.tokenizer`` names (``texts`` is then not read).

    A causal tokenizer without a padding token pads with its end-of-text token.

    Raises:
        ConfigError: it cannot be loaded, is not a fast one, or lacks a token the objective needs.
        DataError: there is no text to train on.
    """
    if isinstance(data.tokenizer, TrainedTokenizer):
        return _train(data.tokenizer.vocab_size, texts, data.objective)
    tokenizer = _pretrained(data.tokenizer.path, data.tokenizer.revision)
    where = f"data.tokenizer.path: {data.tokenizer.path}"
    if end_id(tokenizer, data.objective) is None:
        raise ConfigError(f"{where} has no end token (eos_token or sep_token)")
    if data.objective == "masked":
        for name in ("mask_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ConfigError(f"{where} has no {name}, which the masked objective needs")
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_id(tokenizer: PreTrainedTokenizerBase, objective: str) -> int | None:
    """The token every row begins with, if the tokenizer has one: cls or bos of a masked LM; bos of
    a causal LM, unless it is its end-of-text token too (GPT-2)."""
    if objective == "masked":
        return first_of(tokenizer.cls_token_id, tokenizer.bos_token_id)
    start = tokenizer.bos_token_id
    return None if start == tokenizer.eos_token_id else start


def end_id(tokenizer: PreTrainedTokenizerBase, objective: str) -> int | None:
    """The token that ends a sentence of a masked LM (sep or eos), or a document of a causal LM."""
    if objective == "masked":
        return first_of(tokenizer.sep_token_id, tokenizer.eos_token_id)
    return tokenizer.eos_token_id


def first_of(first: int | None, second: int | None) -> int | None:
    """The first id, if there is one (it may be 0), else the second."""
    return second if first is None else first


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """V, one more than the largest id (``len(tokenizer)`` is less where the ids have holes)."""
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Bool [V], true for the special tokens."""
    special_V = np.zeros(vocabulary_size(tokenizer), dtype=bool)
    special_V[tokenizer.all_special_ids] = True
    added = tokenizer.added_tokens_decoder
    special_V[[index for index, token in added.items() if token.special]] = True
    return special_V


def real_ids(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """The ids that stand for a token, ascending (a vocabulary may have holes)."""
    return np.array(sorted(set(tokenizer.get_vocab().values())), dtype=np.int64)


def continues_word(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Bool [V], true for tokens that continue the word before them.

    Known for WordPiece (``##`` marks the rest of a word), byte-level tokenizers (a word begins with
    a space or line end) and those that write spaces as U+2581 (SentencePiece).

    Raises:
        ConfigError: the tokenizer is of another kind.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = str([spec[name] for name in ("normalizer", "pre_tokenizer", "decoder")])
    vocab = tokenizer.get_vocab()
    if spec["model"]["type"] == "WordPiece":
        prefix = spec["model"]["continuing_subword_prefix"]
        continuing = [i for token, i in vocab.items() if token.startswith(prefix)]
    elif "'ByteLevel'" in parts:
        continuing = [i for token, i in vocab.items() if not token.startswith(_BYTE_SPACES)]
    elif _METASPACE in parts:
        continuing = [i for token, i in vocab.items() if not token.startswith(_METASPACE)]
    else:
        raise ConfigError(
            "data.masking.whole_word: this tokenizer does not mark where words begin "
            f"(its model is {spec['model']['type']})"
        )
    continues_V = np.zeros(vocabulary_size(tokenizer), dtype=bool)
    continues_V[continuing] = True
    return continues_V & ~special_ids(tokenizer)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of what a tokenizer does: vocabulary, merges, normaliser, pre-tokeniser and
    special tokens; names, folders and chat templates do not count."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    roles = {
        role: tokenizer.convert_tokens_to_ids(str(token))
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    about = {
        "vocab": _tokens(tokenizer),
        "merges": spec["model"].get("merges"),
        "scores": spec["model"]["vocab"] if isinstance(spec["model"]["vocab"], list) else None,
        "model": {k: v for k, v in spec["model"].items() if k not in ("vocab", "merges")},
        "normalizer": spec["normalizer"],
        "pre_tokenizer": spec["pre_tokenizer"],
        "added": spec["added_tokens"],
        "roles": roles,
    }
    return fingerprint(about)


def check_same_vocabulary(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, name_a: str, name_b: str
) -> None:
    """Make sure that every id is the same token in both, and that they mask alike.

    Raises:
        ConfigError: they differ; the message shows the first entries that do.
    """
    tokens_a, tokens_b = dict(_tokens(a)), dict(_tokens(b))
    different = sorted({index for index, _ in tokens_a.items() ^ tokens_b.items()})
    if different:
        shown = "".join(
            f"\n  id {index}: {_shown(tokens_a, index)} in {name_a}, "
            f"{_shown(tokens_b, index)} in {name_b}"
            for index in different[:_SHOWN]
        )
        raise ConfigError(
            f"{name_a} and {name_b} have different vocabularies ({len(different)} of "
            f"{max(len(tokens_a), len(tokens_b))} entries); the first:{shown}"
        )
    if None not in (a.mask_token, b.mask_token) and a.mask_token_id != b.mask_token_id:
        raise ConfigError(
            f"{name_a} masks with {a.mask_token} ({a.mask_token_id}), "
            f"{name_b} with {b.mask_token} ({b.mask_token_id})"
        )


def encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A private copy of the Rust tokenizer that neither truncates nor pads, and takes the names of
    special tokens in the text for plain text (a corpus that writes ``<mask>`` is not masked)."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _train(size: int, texts: Iterable[str], objective: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,  # <mask> is added behind
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    first = _first_characters(texts, _TRAINING_CHARACTERS)
    backend.train_from_iterator(first, trainer)
    if backend.get_vocab_size() <= len(_SPECIALS) + len(pre_tokenizers.ByteLevel.alphabet()):
        raise DataError("data.sources: too little text to train a tokenizer on")
    backend.add_special_tokens([AddedToken(_MASK, lstrip=True, special=True)])
    masked = objective == "masked"
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if masked else "<s> $A",
        pair="<s> $A </s> </s> $B </s>" if masked else "<s> $A $B",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken(_MASK, lstrip=True, special=True),
    )


def _pretrained(path: str, revision: str | None) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, use_fast=True)
    except (OSError, ValueError, KeyError) as problem:
        raise ConfigError(f"data.tokenizer.path: cannot load {path}: {problem}") from problem
    if not tokenizer.is_fast:
        raise ConfigError(f"data.tokenizer.path: {path} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    return sorted((index, token) for token, index in tokenizer.get_vocab().items())


def _shown(tokens: dict[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "no token"
