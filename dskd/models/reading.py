"""Weights from a HuggingFace folder into a model, parameter by parameter.

One way for whole and sharded models: a sharded one is filled by rank 0, which holds one parameter
at a time (``from_pretrained`` would read everything on every rank). Equal to ``from_pretrained``,
bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dskd.engine.zero import full_shape, gathered, is_sharded
from dskd.errors import ConfigError
from dskd.models.configs import classes_in
from dskd.models.conversions import as_now
from dskd.models.families import head_in
from dskd.models.weight_files import Stored, open_weights
from dskd.system import dist
from dskd.system.log import say

_RENAMED = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_CONSTANTS = r"embeddings\.position_ids|embeddings\.token_type_ids|rotary_emb(eddings)?\.inv_freq"
_CONSTANTS += r"|attn\.(masked_)?bias"  # of older versions, which saved them
_OTHER_HEADS = r"pooler\..*|cls\.seq_relationship\..*|discriminator_predictions\..*"
_OTHER_HEADS += r"|classifier\..*|score\.weight|qa_outputs\..*|cls\.predictions\..*|lm_head\..*"
_LM_HEADS = r"vocab_(transform|layer_norm|projector)\..*|generator_(predictions|lm_head)\..*"
_LM_HEADS += r"|(lm|mask)_predictions\..*|decoder\.(weight|bias)"

_LEFTOVERS = re.compile(rf"(.*\.)?({_OTHER_HEADS}|{_CONSTANTS})")
"""Tensors of a language model's folder that another head or an older version left there."""
_CLASS_LEFTOVERS = re.compile(rf"(.*\.)?({_OTHER_HEADS}|{_LM_HEADS}|{_CONSTANTS})")
"""Those of a folder from which a model for classification takes what it can use."""
_SHOWN = 6


def load_weights(
    model: PreTrainedModel,
    folder: Path,
    where: str,
    *,
    new_head: bool = False,
    trained_for: PreTrainedConfig | None = None,
    new_ids: Sequence[int] = (),
) -> None:
    """Fill every parameter from ``folder``, rounded to the parameter's dtype (collective).

    With ``new_head``, a head for classes keeps the weights that it has as far as the folder holds
    none; but a folder with such a head must hold all of it, and for the classes of the model:
    ``trained_for`` is its config, None: the model's.

    The rows of ``new_ids`` (:func:`rows_of_tokens`) keep the weights that they have; so the folder
    may hold fewer rows than the model has, which end with them.

    Old names are understood. Heads for other tasks and constants are named and left out; any other
    tensor without a use here is refused, for it belongs to another model, or to the decoding of a
    weight.

    Raises:
        ConfigError: weights are missing, of another shape, damaged, codes instead of numbers, or
            stored apart where the config ties them, or are of a head for other classes; on every
            rank.
    """
    mine = dist.rank() == 0 or not any(is_sharded(p) for p in model.parameters())
    with dist.agreed():
        plan = {}
        if mine:
            stored = _stored(model, as_now(model, open_weights(model, folder, where), where), where)
            if trained_for is not None and _has_class_head(model, stored):
                _refuse_other_classes(model, trained_for, where)
            plan = _plan(model, stored, where, new_head, new_ids)
    grown = rows_of_tokens(model) if new_ids else set()
    for name, parameter in model.named_parameters():
        with gathered([parameter], write=True), torch.no_grad():
            if name in plan:
                values = plan[name].read()
                new = parameter[list(new_ids)] if name in grown else None  # a copy
                (parameter if new is None else parameter[: len(values)]).copy_(values)
                if new is not None:
                    parameter[list(new_ids)] = new


def unrounded_weights(
    model: PreTrainedModel, folder: Path, where: str
) -> Iterator[tuple[str, Tensor]]:
    """What a model in 16 bits has rounded of the folder that it is filled from: parameter by
    parameter the name and the whole values in fp32, on the CPU; without one that the folder has in
    another shape (it has fewer tokens) or in 16 bits itself."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    sources = as_now(model, open_weights(model, folder, where), where)
    stored = {_name_in(model, known, source.key): source for source in sources}
    for name, names in _names(model).items():
        found = [alias for alias in names if alias in stored]
        source = stored[_the_one(model, found, stored, where)] if found else None
        shape = full_shape(model.get_parameter(name))
        if source is not None and source.dtype.itemsize > 2 and source.shape == shape:
            yield name, source.read().float()


def _names(model: PreTrainedModel) -> dict[str, list[str]]:
    """All names of each parameter, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def rows_of_tokens(model: PreTrainedModel) -> set[str]:
    """Names of the parameters with a row for each token: the embeddings, and the last map if it is
    not tied to them."""
    last = model.get_submodule(head_in(model).projection)
    own = {id(p) for p in (model.get_input_embeddings().weight, *last.parameters())}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def in_class_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter of a model for classification is of its head: what stands beside the
    body, and BERT's pooler, which a masked LM does not train."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _has_class_head(model: PreTrainedModel, stored: Mapping[str, Stored]) -> bool:
    """Whether a folder holds the last map of the model's head, which is one for classes."""
    head = head_in(model)
    return head.objective == "classification" and f"{head.projection}.weight" in stored


def _refuse_other_classes(model: PreTrainedModel, config: PreTrainedConfig, where: str) -> None:
    theirs, own = classes_in(config), classes_in(model.config)
    if theirs != own:
        raise ConfigError(
            f"{where}: its head is for the {len(theirs)} classes {_some(theirs)}; those of the "
            f"data, in order, are {len(own)}: {_some(own)}"
        )


def _stored(model: PreTrainedModel, sources: list[Stored], where: str) -> dict[str, Stored]:
    """The tensors of a folder by the model's names for them."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = {_name_in(model, known, source.key): source for source in sources}
    _refuse_foreign(model, stored, known, where)
    return stored


def _plan(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    where: str,
    new_head: bool,
    new_ids: Sequence[int],
) -> dict[str, Stored]:
    """The source of each parameter, by the first of its names."""
    grown = rows_of_tokens(model) if new_ids else set()
    names = _names(model)
    plan, missing, wrong = {}, [], []
    for name, parameter in model.named_parameters():
        found = [alias for alias in names[name] if alias in stored]
        if not found:
            missing.append(name)
            continue
        plan[name] = stored[_the_one(model, found, stored, where)]
        here, there = tuple(full_shape(parameter)), tuple(plan[name].shape)
        fits = name in grown and here[1:] == there[1:] and new_ids[0] <= there[0] <= here[0]
        if here != there and not fits:
            wrong.append(f"{name} is {there}, the config says {here}")
    if new_head and not _has_class_head(model, stored):
        random = [name for name in missing if in_class_head(model, name)]
        missing = [name for name in missing if name not in random]
        say(f"{where}: no head for classes there; random weights for {_some(random)}")
    if missing:
        raise ConfigError(f"{where}: weights are missing: {_some(missing)}")
    if wrong:
        raise ConfigError(f"{where}: weights do not fit: {_some(wrong)}")
    return plan


def _refuse_foreign(
    model: PreTrainedModel, stored: Mapping[str, Stored], known: set[str], where: str
) -> None:
    """Refuse what is neither a weight of the model nor a known leftover; name the leftovers."""
    codes = [
        f"{n} ({stored[n].dtype})" for n in sorted(stored.keys() & known) if not stored[n].is_value
    ]
    if codes:
        raise ConfigError(
            f"{where}: weights are stored as codes of a quantised model: {_some(codes)}"
        )
    unused = sorted(stored.keys() - known)
    for_classes = head_in(model).objective == "classification"
    leftovers = _CLASS_LEFTOVERS if for_classes else _LEFTOVERS
    foreign = [name for name in unused if not leftovers.fullmatch(name)]
    if foreign:
        raise ConfigError(
            f"{where}: tensors that this model has no use for: {_some(foreign)}; they belong to "
            f"another model or config, or to the decoding of quantised weights"
        )
    if unused:
        say(f"{where}: weights without use here are left out: {_some(unused)}")


def _the_one(
    model: PreTrainedModel, found: list[str], stored: Mapping[str, Stored], where: str
) -> str:
    """The name to read a parameter under, of those it is stored under."""
    head = head_in(model)
    if head.bias is not None and f"{head.projection}.bias" in found:
        return f"{head.projection}.bias"  # the head's own copy is not in the forward pass
    first, *others = found
    for other in others:
        if not torch.equal(stored[first].read(), stored[other].read()):
            raise ConfigError(
                f"{where}: the config ties {first} and {other}, but they are stored with different "
                "values; set tie_word_embeddings: false in the model's config settings"
            )
    return first


def _name_in(model: PreTrainedModel, known: set[str], key: str) -> str:
    """The model's name for a stored key: old spellings, and bodies saved without their prefix."""
    for old, new in _RENAMED:
        key = key.replace(old, new)
    prefixed = f"{model.base_model_prefix}.{key}"
    return prefixed if key not in known and prefixed in known else key


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
