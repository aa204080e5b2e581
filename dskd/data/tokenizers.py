"""Tokenizers: trained on the run's own text or any fast HuggingFace one, compared by content.

Two vocabularies are the same when every id means the same token in both; their sizes tell nothing
(equal sizes with permuted tokens would train on garbage without any sign of it).

Shape letter: V, one entry for each id of the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dskd.data.foreign import raised_as
from dskd.data.stored_tokenizer import stored_tokenizer
from dskd.errors import ConfigError, DataError
from dskd.settings.data import Data, TrainedTokenizer
from dskd.system.files import fingerprint

_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0..3; <mask> comes last, as in RoBERTa
_MASK = "<mask>"
_WITH_TYPES = ["input_ids", "token_type_ids", "attention_mask"]
_TRAINING_CHARACTERS = 100_000_000  # more text hardly changes the merges
_SHOWN = 5
_BYTE_SPACES = ("\u0120", "\u0109", "\u010a", "\u010d")  # space, tab, line ends in byte-level BPE
_METASPACE = "\u2581"


def load_tokenizer(data: Data, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The run's tokenizer: trained on ``texts`` (at most their first 100 million characters), or
    the pretrained one that ``data.tokenizer`` names (``texts`` is then not read).

    The special tokens of ``data.questions`` are put behind the vocabulary of a pretrained one that
    lacks them. It reads the names of special tokens in a text as text (``split_special_tokens``),
    also once it is saved and loaded again. A causal tokenizer without a padding token pads with its
    end-of-text token.

    Raises:
        ConfigError: it cannot be loaded, is not a fast one, lacks a token the objective needs, or
            makes a special token of plain text whatever is done about it.
        DataError: there is no text to train on.
    """
    if isinstance(data.tokenizer, TrainedTokenizer):
        return _train(data.tokenizer.vocab_size, texts, data.objective, data.question_tokens)
    source = data.tokenizer
    tokenizer = stored_tokenizer(
        source.path,
        "data.tokenizer.path",
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
    )
    where = f"data.tokenizer.path: {source.path}"
    if data.objective == "classification":
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise ConfigError(f"{where} has no pad_token and no eos_token to pad with")
    elif end_id(tokenizer, data.objective) is None:
        raise ConfigError(f"{where} has no end token (eos_token or sep_token)")
    if data.objective == "masked":
        for name in ("mask_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ConfigError(f"{where} has no {name}, which the masked objective needs")
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _add_tokens(tokenizer, data.question_tokens, where)
    backend = encoder(tokenizer, where)
    own = json.loads(tokenizer.backend_tokenizer.to_str())
    changed = json.loads(backend.to_str())["pre_tokenizer"] != own["pre_tokenizer"]
    if changed or not type(tokenizer).__module__.startswith("transformers."):
        return _with_backend(tokenizer, backend, where)
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str], where: str) -> None:
    """Put special tokens behind a vocabulary that lacks them.

    Raises:
        ConfigError: it has one of them as a piece of text, or for something else.
    """
    vocabulary, special_V = tokenizer.get_vocab(), special_ids(tokenizer)
    roles = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    for token in tokens:
        if token in roles or (token in vocabulary and not special_V[vocabulary[token]]):
            what = "for something else" if token in roles else "as a piece of text"
            raise ConfigError(f"data.questions: {where} has {token!r} {what}; name another token")
    new = [token for token in tokens if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in new], True)


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


def continues_word(
    tokenizer: PreTrainedTokenizerBase, where: str = "data.masking.whole_word"
) -> NDArray[np.bool_]:
    """Bool [V], true for tokens that continue the word before them.

    Known for WordPiece (``##`` marks the rest of a word), byte-level tokenizers (a word begins with
    a space or line end) and those that write spaces as U+2581 (SentencePiece).

    Raises:
        ConfigError: the tokenizer is of another kind; names the setting ``where``.
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
            f"{where}: this tokenizer does not mark where words begin "
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


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of what a tokenizer puts around one text or two, where it cuts them, and what it
    hands to a model."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    names = tokenizer.model_input_names
    side = tokenizer.truncation_side
    return fingerprint({"template": spec["post_processor"], "side": side, "names": names})


def further_ids(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> list[int]:
    """Ids of special tokens that ``a`` has behind all those of ``b``, ascending; ``b`` has no such
    token."""
    special_V, first, known = special_ids(a), vocabulary_size(b), b.get_vocab()
    return [i for i, token in _tokens(a) if i >= first and special_V[i] and token not in known]


def check_same_vocabulary(
    a: PreTrainedTokenizerBase,
    b: PreTrainedTokenizerBase,
    name_a: str,
    name_b: str,
    but: Iterable[int] = (),
) -> None:
    """Make sure that every id is the same token in both, ``but`` for some of ``a``'s, and that they
    mask alike.

    Raises:
        ConfigError: they differ; the message shows the first entries that do.
    """
    tokens_a, tokens_b = dict(_tokens(a)), dict(_tokens(b))
    for index in but:
        del tokens_a[index]
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


def may_be_trained(tokenizer: PreTrainedTokenizerBase, settings: TrainedTokenizer) -> bool:
    """Whether training a tokenizer by these settings could, on some text, come to this one."""
    tokens = dict(_tokens(tokenizer))
    first = [tokens.get(index) for index in range(len(_SPECIALS))]
    return (
        first == _SPECIALS and tokens[max(tokens)] == _MASK and len(tokens) <= settings.vocab_size
    )


def encoder(tokenizer: PreTrainedTokenizerBase, where: str = "data.tokenizer") -> Tokenizer:
    """A private copy of the Rust tokenizer that neither truncates nor pads, and takes the names of
    special tokens in a text for text (a corpus that writes ``<mask>`` is not masked).

    The Rust tokenizer can be kept from cutting the names out of the text before its model sees it;
    but a model that has them among its pieces (Unigram, as of XLM-R) finds them by itself. There, a
    pre-tokenizer cuts each name behind its first character: ids, pieces and scores stay.

    Raises:
        ConfigError: it makes a special token of text all the same; ``where`` is the setting.
    """
    plain = _copy(tokenizer)
    special = set(np.flatnonzero(special_ids(tokenizer)).tolist())
    names = sorted(token for token, index in tokenizer.get_vocab().items() if index in special)
    texts = {name: f"{name} a{name}{name}" for name in names}

    def made_by(backend: Tokenizer, text: str) -> set[int]:
        with raised_as(ConfigError, f"{where}: cannot encode {text!r}"):
            return special.intersection(backend.encode(text, add_special_tokens=False).ids)

    found = {name: made for name, text in texts.items() if (made := made_by(plain, text))}
    if not found:
        return plain
    cuts = [f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names if len(n) > 1]
    split = pre_tokenizers.Split(Regex("|".join(cuts) or "(?!)"), "removed")
    cut = _copy(tokenizer)
    before = [] if cut.pre_tokenizer is None else [cut.pre_tokenizer]
    cut.pre_tokenizer = pre_tokenizers.Sequence([*before, split])
    unknown, needed = unknown_id(plain), False
    for name, made in found.items():
        left = made_by(cut, texts[name])
        if left - {unknown}:
            raise ConfigError(
                f"{where} makes the special token {name!r} of the text {texts[name]!r}"
            )
        needed |= bool(made - left)
    return cut if needed else plain


def _copy(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def unknown_id(backend: Tokenizer) -> int | None:
    """The id that stands for text that the model has no piece for."""
    model = json.loads(backend.to_str())["model"]
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else backend.token_to_id(name)


def _train(
    size: int, texts: Iterable[str], objective: str, further: list[str]
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,  # <mask> is added behind
        special_tokens=_SPECIALS + further,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    first = _first_characters(texts, _TRAINING_CHARACTERS)
    backend.train_from_iterator(first, trainer)
    untrained = len(_SPECIALS + further) + len(pre_tokenizers.ByteLevel.alphabet())
    if backend.get_vocab_size() <= untrained:
        raise DataError("data.sources: too little text to train a tokenizer on")
    backend.add_special_tokens([AddedToken(_MASK, lstrip=True, special=True)])
    # Of classes the first token is read, or the last; types tell the texts of a pair apart.
    single, pair = {
        "masked": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "causal": ("<s> $A", "<s> $A $B"),
        "classification": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    }[objective]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
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
        split_special_tokens=True,
        **({"model_input_names": _WITH_TYPES} if objective == "classification" else {}),
    )


def _with_backend(
    tokenizer: PreTrainedTokenizerFast, backend: Tokenizer, where: str
) -> PreTrainedTokenizerFast:
    """The tokenizer with another Rust tokenizer in it, and of the class that has no code of its
    own: a class for the model would make the Rust tokenizer anew, and code that came with the
    tokenizer would be needed again wherever rows or exports are read."""
    with raised_as(ConfigError, f"{where}: cannot be saved"), TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        backend.save(str(Path(folder) / "tokenizer.json"))
        plain = PreTrainedTokenizerFast.from_pretrained(folder)
    plain.init_kwargs.pop("auto_map", None)
    return plain


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
