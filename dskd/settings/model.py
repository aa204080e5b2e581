"""Settings of a model: loaded or random, whole or sliced."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dskd.settings.base import RunPath, Section


class Slice(Section):
    """The sizes that a larger model is cut to: its units with the largest weights stay."""

    hidden_size: int = Field(ge=1)
    """Width of the student."""
    intermediate_size: int | None = Field(None, ge=1)
    """Width of its feed-forward parts; null: in proportion to ``hidden_size``."""
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    """With ``heads``, how many heads remain; null: in proportion, or as ``strategy`` says."""
    strategy: Literal["dim", "head"] = "dim"
    """How attention gets narrower: ``dim``: narrower heads; ``head``: fewer. Families with rotary
    positions always lose whole groups of heads."""


class Model(Section):
    """A HuggingFace model for the objective of the data, loaded or built at random."""

    path: Annotated[str | None, RunPath("export")] = None
    """Folder or hub id to load; ``run:NAME`` is the export of another run of the recipe; null:
    random weights from ``config``."""
    revision: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the HuggingFace config. Without ``path`` it must name a ``model_type``; the
    vocabulary size and special token ids come from the tokenizer. A student with experts has their
    balance loss beside the method's, taken of each row, ``router_aux_loss_coef`` times; 0: none."""
    vocab_multiple: int = Field(1, ge=1)
    """Pad a random model's vocabulary to a multiple of this."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    """Run the Python code that lies in the folder or hub repository of ``path``; without it such
    code is never run, nor asked about."""
    new_tokens: bool = False
    """Of a student with a ``path``: special tokens that the data's tokenizer has behind the model's
    own vocabulary (those of ``data.questions``) get random embeddings of the run's seed, as the
    model's config has them (GPT-2: normal, 0.02); false: a model that lacks them is refused."""
    slice: Slice | None = None
    """Of a student with a ``path``: start from that model cut to these sizes, as ``<out>/sliced``
    then holds it; null: from the whole model."""
