"""How much text the rows of a causal LM stand for: the documents' own bytes, counted while they are
tokenized, and a fingerprint that is the same for every vocabulary.

So losses of different tokens can be compared, in bits per byte. Nothing is decoded again: a
document's bytes are those of its text as UTF-8, as it was read and before a tokenizer's normaliser
saw it. Where a part of the text is hidden behind the unknown token, or in no row, the loss is not
of these bytes, and there is no such number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from dskd.data.packing import Items
from dskd.data.tokenizers import encoder, end_id, unknown_id


class Text(BaseModel):
    """Some documents.

    Attributes:
        bytes: of their texts as UTF-8.
        tokens: of their texts, and those that end documents; no start tokens of rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=1)
    tokens: int = Field(ge=1)


class SplitText(BaseModel):
    """The documents of a split.

    Attributes:
        fingerprint: of their texts, one after the other.
        domains: the same by domain; of those that were read as text.
        hidden: why the rows do not stand for all of the text; empty: they do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    domains: dict[str, Text]
    hidden: str = ""

    @model_validator(mode="after")
    def _says_something(self) -> SplitText:
        if not self.domains and not self.hidden:
            raise ValueError("no domain, and no reason why")
        return self

    @property
    def whole(self) -> Text:
        """All documents."""
        every = self.domains.values()
        return Text(bytes=sum(d.bytes for d in every), tokens=sum(d.tokens for d in every))


class TextCounter:
    """Counts the documents of a split of rows of a causal LM while they are tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = encoder(tokenizer)
        self._drops = _drops_text(backend)
        self._unknown = unknown_id(backend)
        self._unknown_ends = self._unknown == end_id(tokenizer, "causal")
        self._digest = xxhash.xxh3_128()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._hidden = 0
        self._untold: list[str] = []

    def take_tokens(self, domain: str) -> None:
        """Note a domain whose documents came as tokens, so that nobody knows their bytes."""
        if domain not in self._untold:
            self._untold.append(domain)

    def take(self, domain: str, texts: Sequence[str], items: Items) -> None:
        """Count some documents of a domain, and what they became."""
        size, tokens = self._sizes.get(domain, (0, 0))
        for text in texts:
            raw = text.encode()
            self._digest.update(len(raw).to_bytes(8, "little"))
            self._digest.update(raw)
            size += len(raw)
        self._sizes[domain] = (size, tokens + len(items.ids))
        if self._unknown is not None:
            ends = sum(items.separators) if self._unknown_ends else 0
            self._hidden += int(np.count_nonzero(items.ids == self._unknown)) - ends

    def counted(self, tokens: int) -> SplitText | None:
        """What was counted; None if there was nothing.

        Args:
            tokens: that are in rows, without start tokens.
        """
        domains = {
            name: Text(bytes=size, tokens=count)
            for name, (size, count) in self._sizes.items()
            if size and count
        }
        if not domains and not self._untold:
            return None
        hidden = ""
        lost = sum(text.tokens for text in domains.values()) - tokens
        if self._untold:
            names = ", ".join(self._untold)
            hidden = f"{names}: read as tokens (kind: fairseq), without their text"
        elif self._drops:
            hidden = "the tokenizer leaves out what it has no token for"
        elif self._hidden:
            hidden = f"{self._hidden:,} tokens are the unknown token, which hides text"
        elif lost:
            hidden = f"data.packing leaves {lost:,} tokens out of the rows"
        return SplitText(fingerprint=self._digest.hexdigest(), domains=domains, hidden=hidden)


def _drops_text(backend: Tokenizer) -> bool:
    """Whether letters may vanish: of a BPE without an unknown token that does not know all bytes
    (all other models have one, or raise)."""
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE" or unknown_id(backend) is not None:
        return False
    before = str([spec["normalizer"], spec["pre_tokenizer"]])
    letters = pre_tokenizers.ByteLevel.alphabet() if "'ByteLevel'" in before else None
    if letters is None and spec["model"].get("byte_fallback"):
        letters = [f"<0x{value:02X}>" for value in range(256)]
    return letters is None or any(backend.token_to_id(letter) is None for letter in letters)
