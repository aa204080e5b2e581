"""A HuggingFace tokenizer from a folder or the hub, loaded or refused in one message."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dskd.data.foreign import raised_as
from dskd.errors import ConfigError, DskdError

_SPARSEST = 4
"""Most ids for each token: a table of all ids is then about as large as the vocabulary's file."""
_SPARE = 2**16
"""Ids beyond that, for the small vocabularies whose special tokens lie far behind."""


def stored_tokenizer(
    path: str,
    where: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    error: type[DskdError] = ConfigError,
) -> PreTrainedTokenizerFast:
    """The tokenizer that lies at ``path``; its code is run only if ``trust_remote_code``, and
    nobody is asked whether it may.

    It reads the names of special tokens in a text as text (``split_special_tokens``), and does not
    say where code for it would be found: what is saved of it has none beside it.

    Args:
        path: folder or hub id.
        where: what names it, for messages.
        error: what is raised.

    Raises:
        DskdError: ``error``: it cannot be loaded, is not a fast one, or has no usable ids.
    """
    if revision is not None and Path(path).is_dir():
        raise error(f"{where}: {path} is a folder, which has no revision {revision!r}")
    with raised_as(error, f"{where}: cannot load {path}"):
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            use_fast=True,
            split_special_tokens=True,
            trust_remote_code=trust_remote_code,
        )
    if not tokenizer.is_fast:
        raise error(f"{where}: {path} has no fast tokenizer (tokenizer.json)")
    _refuse_sparse(tokenizer, f"{where}: {path}", error)
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _refuse_sparse(tokenizer: PreTrainedTokenizerFast, where: str, error: type[DskdError]) -> None:
    """Refuse ids that no table can have an entry for each of."""
    ids = tokenizer.get_vocab()
    if not ids:
        raise error(f"{where}: its vocabulary is empty")
    last = max(ids, key=ids.__getitem__)
    if ids[last] >= _SPARSEST * len(ids) + _SPARE:
        raise error(
            f"{where}: {last!r} has the id {ids[last]}, far beyond its number of tokens, {len(ids)}"
        )
