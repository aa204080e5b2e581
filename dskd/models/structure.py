"""How a language model turns hidden states into logits, found from the model and proved.

A small copy of the model, of the same class and config in all but its sizes, is made on the CPU. On
it is seen which modules HuggingFace's own forward pass calls between the body and the last linear
map, and what it does to what that map gives. Then the logits of a padded batch, made as here, are
held against HuggingFace's. That is the same on every rank and at every ZeRO stage, and needs none
of the model's weights.

Shape letters: B rows, T tokens, N tokens of all rows that are no padding, V vocabulary, D hidden.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from dskd.batch import IGNORE, Batch, LogitMap
from dskd.engine.zero import whole_construction
from dskd.errors import ConfigError
from dskd.models.attention_masks import attention_arguments
from dskd.models.experts import compute_without_values
from dskd.models.heads import Head, ObjectiveName, Transform
from dskd.models.joined_heads import JOINED
from dskd.models.reaching import numberless, reached
from dskd.models.shrinking import small_copies

LANGUAGE = {"masked": MODEL_FOR_MASKED_LM_MAPPING, "causal": MODEL_FOR_CAUSAL_LM_MAPPING}
"""HuggingFace's model class by config class, for each kind of language modelling."""

_MOST = 150_000_000
"""Most parameters of a small copy."""
_ROWS, _TOKENS, _SHORT = 2, 14, 9
_TOLERANCE = 2e-4
"""Of the logits' largest magnitude: fp32 on a CPU, by another order of operations."""
_SPECIALS = 8
"""Ids below this one are not used as tokens: padding may be among them."""


class Unusual(Exception):
    """Why a model's logits cannot be made here; the message says what is unusual about it."""


class MakesNone(Exception):
    """Why a config makes no model."""


def language_objective(model_type: str) -> ObjectiveName | None:
    """What a model type is trained on as a language model: one that HuggingFace has a masked LM
    class for is a masked LM, whatever else it can be; None: it has neither class."""
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked"
    return "causal" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def language_types() -> list[str]:
    """All model types that HuggingFace has a masked or a causal LM class of."""
    return [*(MODEL_FOR_MASKED_LM_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


def language_head(config: PreTrainedConfig, where: str) -> Head:
    """The head by which a model of this config models language.

    Raises:
        ConfigError: its logits cannot be made here; names the setting ``where`` and the reason.
    """
    found = _found(config)
    if isinstance(found, MakesNone):
        raise ConfigError(f"{where}: its config makes no model: {found}")
    if isinstance(found, Unusual):
        raise ConfigError(f"{where}.config.model_type: {config.model_type}: {found}")
    return found


_HEADS: dict[tuple[type[PreTrainedConfig], str], Head | Unusual | MakesNone] = {}


def _found(config: PreTrainedConfig) -> Head | Unusual | MakesNone:
    """Once for all models whose configs differ in nothing that matters to a head."""
    key = (type(config), _key(config))
    if key not in _HEADS:
        try:
            # Whoever asks may be making a model without memory, or evaluating one.
            with (
                whole_construction(),
                torch.device("cpu"),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                _HEADS[key] = _discover(config)
        except (Unusual, MakesNone) as reason:
            _HEADS[key] = reason
    return _HEADS[key]


_OF_NO_HEAD = re.compile(
    r"vocab_size|.*_token_id|dtype|id2label|label2id|problem_type|architectures|_name_or_path|"
    r"transformers_version|_?attn_implementation|use_cache"
)
"""Fields of a config that a head is the same without."""


def _key(config: PreTrainedConfig) -> str:
    return json.dumps(_of_head(config.to_dict()), sort_keys=True, default=str)


def _of_head(fields: dict[str, Any]) -> dict[str, Any]:
    """Those of a config's fields that a head may differ by, and of the configs in it (MPT's)."""
    kept = {name: value for name, value in fields.items() if not _OF_NO_HEAD.fullmatch(name)}
    return {n: _of_head(value) if isinstance(value, dict) else value for n, value in kept.items()}


def reads_values(config: PreTrainedConfig) -> bool:
    """Whether a language model's forward pass reads numbers of tensors, which one without memory
    does not have."""
    key = (type(config), _key(config))
    if key not in _READS_VALUES:
        cls = LANGUAGE[language_objective(config.model_type)][type(config)]
        # One that runs is enough: the config's own sizes may be such that none does.
        _READS_VALUES[key] = not any(_runs_without_memory(cls, c) for c, _ in _copies(config))
    return _READS_VALUES[key]


def _runs_without_memory(cls: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    with whole_construction(), torch.device("meta"):
        try:
            model = cls(config).eval()
            compute_without_values(model)
            model(torch.zeros(1, 2, dtype=torch.long))
        except (NotImplementedError, RuntimeError, ValueError):
            return False
    return True


_READS_VALUES: dict[tuple[type[PreTrainedConfig], str], bool] = {}


def padding_position(config: PreTrainedConfig) -> int | None:
    """The token id that a model counts the positions of a row past (RoBERTa: its padding); None: it
    counts them from 0."""
    key = (type(config), _key(config))
    if key not in _POSITIONS:
        _POSITIONS[key] = _padding_position(config)
    own = _POSITIONS[key]
    return config.pad_token_id if own == _ITS_PADDING else own


_ITS_PADDING = -1
_POSITIONS: dict[tuple[type[PreTrainedConfig], str], int | None] = {}


def _padding_position(config: PreTrainedConfig) -> int | None:
    small, _ = _copies(config)[0]
    small.pad_token_id = own = 3  # unlike any that a class has by itself
    with whole_construction(), torch.device("meta"):
        body = MODEL_MAPPING[type(config)](small)
    for name, module in body.named_modules():
        # I-BERT has a class of its own for embeddings.
        found = getattr(module, "padding_idx", None) is not None
        if found and "position_embeddings" in name:
            return _ITS_PADDING if module.padding_idx == own else module.padding_idx
    return None


def _discover(config: PreTrainedConfig) -> Head:
    objective = language_objective(config.model_type)
    if objective is None:
        raise Unusual(
            f"transformers {transformers.__version__} has no masked or causal LM class of it"
        )
    if config.is_encoder_decoder:
        raise Unusual("an encoder with a decoder, whose logits need a second text")
    text = config.get_text_config()
    if text is not config:
        raise Unusual(
            f"its text model is a part of it, beside others; only a text model alone "
            f"({text.model_type}) can be used here"
        )
    if type(config) not in LANGUAGE[objective]:
        raise Unusual(f"its config is a {type(config).__name__} of its folder's own code")
    if type(config) not in MODEL_MAPPING:
        raise Unusual("transformers has no class of its body alone")
    return _of_copies(config, LANGUAGE[objective][type(config)], objective)


def _of_copies(
    config: PreTrainedConfig, cls: type[PreTrainedModel], objective: ObjectiveName
) -> Head:
    """The head that two narrow copies have, or one of the config's own width."""
    heads: list[Head] = []
    for small, full_width in _copies(config):
        try:
            with torch.random.fork_rng(devices=[]):
                model = _made(cls, small)
                theirs_BTV = _theirs(model)
        except Unusual:
            raise
        except Exception as problem:  # whatever a class raises at sizes that it does not take
            if full_width:
                raise MakesNone(f"{type(problem).__name__}: {problem}") from problem
            continue
        heads.append(_head(model, objective, theirs_BTV))
        if heads[0].map != heads[-1].map:
            raise Unusual("what is done to the output of its last linear map hangs on its width")
        if full_width or len(heads) == 2:
            break
    return heads[-1]


def _copies(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, bool]]:
    try:
        return [*small_copies(config)]
    except Exception as problem:  # whatever a config raises at a value that it does not take
        raise MakesNone(f"{type(problem).__name__}: {problem}") from problem


def _made(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, in eval mode, on the CPU in fp32."""
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > _MOST:
        raise Unusual(f"a small copy of it, by which it is proved, has {count:,} parameters")
    model = cls(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # such that nothing in it is next to nothing
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def _batch(vocabulary: int, pad: int, *, padded: bool) -> Batch:
    generator = torch.Generator().manual_seed(1)
    low = min(_SPECIALS, vocabulary - 2)
    ids_BT = torch.randint(low, vocabulary, (_ROWS, _TOKENS), generator=generator)
    lengths_B = torch.tensor([_TOKENS, _SHORT if padded else _TOKENS])
    mask_BT = (torch.arange(_TOKENS) < lengths_B[:, None]).long()
    return Batch.of(
        row_ids_B=torch.arange(_ROWS),
        domains_B=torch.zeros(_ROWS, dtype=torch.long),
        ids_BT=torch.where(mask_BT == 1, ids_BT, pad),
        mask_BT=mask_BT,
        labels_BT=torch.where(mask_BT == 1, ids_BT, IGNORE),
    )


def _batch_of(model: PreTrainedModel, *, padded: bool = True) -> Batch:
    pad = getattr(model.config, "pad_token_id", None)
    return _batch(model.config.vocab_size, 0 if pad is None else pad, padded=padded)


@torch.no_grad()
def _theirs(model: PreTrainedModel, batch: Batch | None = None) -> Tensor:
    """HuggingFace's own logits [B, T, V]."""
    batch = _batch_of(model) if batch is None else batch
    out = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT)
    logits_BTV = getattr(out, "logits", None)
    if not isinstance(logits_BTV, Tensor):
        raise Unusual(f"the forward pass of a {type(model).__name__} gives no logits")
    shape = (*batch.ids_BT.shape, model.config.vocab_size)
    if logits_BTV.shape != shape:
        raise Unusual(
            f"the logits of {shape[0]} rows of {shape[1]} tokens, {shape[2]} in the vocabulary, "
            f"have the shape {list(logits_BTV.shape)}"
        )
    return logits_BTV


def _head(model: PreTrainedModel, objective: ObjectiveName, theirs_BTV: Tensor) -> Head:
    """What is found on a small model, proved."""
    body = model.base_model
    if body is model or not isinstance(body, nn.Module):
        raise Unusual(f"a {type(model).__name__} has no body apart from its head")
    if objective == "causal":
        _refuse_looking_ahead(model, theirs_BTV)
    joined = next((each for each in JOINED if each.is_of(model)), None)
    if joined is None:
        head = _linear_head(model, objective)
    else:
        head = Head(objective, joined.path, joined.transform, bias=joined.bias, joined=joined)
    return _proved(model, head, theirs_BTV)


def _refuse_looking_ahead(model: PreTrainedModel, theirs_BTV: Tensor) -> None:
    batch = _batch_of(model)
    changed_BT = batch.ids_BT.clone()
    changed_BT[:, _SHORT - 1 :] = model.config.vocab_size - 1
    changed_BTV = _theirs(model, replace(batch, ids_BT=changed_BT))
    if not _close(changed_BTV[:, : _SHORT - 1], theirs_BTV[:, : _SHORT - 1]):
        raise Unusual("a causal LM whose logits at a token change with the tokens after it")


def _linear_head(model: PreTrainedModel, objective: ObjectiveName) -> Head:
    """The head of a model whose last linear map is one module."""
    linear = model.get_output_embeddings()
    path = next((name for name, each in model.named_modules() if each is linear), None)
    if linear is None or path is None:
        raise Unusual(f"a {type(model).__name__} names no module that makes its logits")
    weight = getattr(linear, "weight", None)
    rows = model.config.vocab_size
    if not isinstance(linear, nn.Linear) or weight is None or len(weight) != rows:
        raise Unusual(
            f"its logits are made by {path}, a {type(linear).__name__}, not by a linear map to "
            f"the {rows} tokens"
        )
    chain = _chain(model, path)
    return Head(
        objective,
        path,
        _through(chain, path),
        bias=_own_bias(model, path),
        map=_map_of(model, linear),
    )


def _chain(model: PreTrainedModel, path: str) -> tuple[str, ...]:
    """The modules beside the body that a forward pass calls, from it to the last linear map."""
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, child in model.named_children()
        # OPT's forward pass calls a part of the body, which is all that the body calls.
        for module in (child.modules() if child is model.base_model else (child,))
    ]
    try:
        _theirs(model)
    finally:
        for hook in hooks:
            hook.remove()
    body, last = model.base_model_prefix, path.split(".", maxsplit=1)[0]
    if body not in called:
        raise Unusual(f"the forward pass of a {type(model).__name__} does not call its body")
    after = called[len(called) - called[::-1].index(body) :]
    if last not in after:
        raise Unusual(f"{path} is not called after the body")
    return tuple(after[: after.index(last) + 1])


def _through(chain: tuple[str, ...], path: str) -> Transform:
    """What is done between the body and the last linear map."""
    *before, last = chain
    within = path.removeprefix(last).removeprefix(".")
    if not before and not within:
        return _nothing
    return functools.partial(_call, tuple(before), last, within)


def _nothing(model: Any, hidden_ND: Tensor) -> Tensor:
    del model
    return hidden_ND


def _call(before: tuple[str, ...], last: str, within: str, model: Any, hidden_ND: Tensor) -> Tensor:
    for name in before:
        hidden_ND = getattr(model, name)(hidden_ND)
    if not within:
        return hidden_ND
    owner = getattr(model, last)
    with _left_out(owner, within):
        found = owner(hidden_ND)
    return found[0] if isinstance(found, tuple) else found


_IDENTITY = nn.Identity()


@contextmanager
def _left_out(owner: nn.Module, path: str) -> Iterator[None]:
    """One module inside of another does nothing meanwhile, nor do its hooks: it is called by its
    own right later on, and ZeRO-3 would put its weights together twice."""
    parent, _, name = path.rpartition(".")
    children = owner.get_submodule(parent)._modules
    own = children[name]
    children[name] = _IDENTITY
    try:
        yield
    finally:
        children[name] = own


def _own_bias(model: PreTrainedModel, path: str) -> str | None:
    """The module with a copy of the last map's bias that has no part in the forward pass."""
    tied = model._tied_weights_keys
    source = tied.get(f"{path}.bias") if isinstance(tied, dict) else None
    return None if source is None else source.rpartition(".")[0]


def _map_of(model: PreTrainedModel, linear: nn.Linear) -> LogitMap:
    """What the forward pass makes of what the last linear map gives: that is replaced by a row of
    numbers, some of them beyond any softcap."""
    count = model.config.vocab_size
    values_V = torch.linspace(-8.0, 8.0, count)
    values_V[:6] = torch.tensor([0.0, 1.0, -1.0, 1e-3, 1e6, -1e6])

    def replaced(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        del module, inputs
        return values_V.expand_as(out).clone()

    hook = linear.register_forward_hook(replaced)
    try:
        found_V = _theirs(model)[0, 0].float()
    finally:
        hook.remove()
    scale = found_V[1].item()
    softcap = 0.0
    if found_V[4] < 1e5 * abs(scale):  # 1e6 times the scale, were it linear
        softcap = found_V[4].item()
        scale = 1e3 * found_V[3].item()
    scale = _rounded(model.config, scale)
    if not (0 < scale < float("inf") and softcap >= 0):
        raise Unusual(f"1 that its last linear map gives becomes a logit of {scale:g}")
    found = LogitMap(scale, softcap)
    if not _close(found.of(values_V), found_V, 1e-5):
        raise Unusual(
            "what is done to the numbers that its last linear map gives is neither a scale nor a "
            "softcap"
        )
    return found


def _rounded(config: PreTrainedConfig, scale: float) -> float:
    """A scale as the config says it, of which fp32 has shown a few digits."""
    given = [v for v in vars(config).values() if isinstance(v, int | float) and v]
    for value in (1.0, *given, *(1.0 / v for v in given)):
        if abs(value - scale) < 1e-6 * abs(scale):
            return float(value)
    return scale


def _proved(model: PreTrainedModel, head: Head, theirs_BTV: Tensor) -> Head:
    """The head, with what its body must be told of padding, once its logits are HuggingFace's."""
    whole = _batch_of(model, padded=False)
    whole_BTV = _theirs(model, whole)
    problems = []
    for told in (False, True):
        each = replace(head, rows_mask=told)
        try:
            padded = _difference(model, each, _batch_of(model), theirs_BTV)
            unpadded = _difference(model, each, whole, whole_BTV)
        except Exception as problem:  # whatever a class raises at a mask that it does not take
            problems.append(f"{type(problem).__name__}: {problem}")
            continue
        if padded is None and unpadded is None:
            run = functools.partial(_difference, model, each, _batch_of(model), theirs_BTV)
            return replace(each, unused=_unused(model), reached=reached(model.base_model, run))
        problems.append(padded or unpadded)
    raise Unusual(
        f"its logits are not the last hidden state's, through {head.projection}: {problems[-1]}"
    )


def _unused(model: PreTrainedModel) -> frozenset[str]:
    """Parameters that are trained, but have no part in logits, in no layer."""
    batch = _batch_of(model)
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    # Read off the graph, not from gradients: a backward pass starts threads where there is a GPU,
    # and a process that has them cannot fork.
    nodes, seen, reached_ids = [logits_BTV.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached_ids.add(id(node.variable))
        nodes += [before for before, _ in node.next_functions]
    named = [(numberless(n), p) for n, p in model.named_parameters() if p.requires_grad]
    used = {name for name, parameter in named if id(parameter) in reached_ids}
    return frozenset(name for name, _ in named) - used


@torch.no_grad()
def _difference(model: PreTrainedModel, head: Head, batch: Batch, theirs_BTV: Tensor) -> str | None:
    """What differs from HuggingFace's logits where there is no padding; None: nothing."""
    arguments = attention_arguments(
        model, batch, causal=head.objective == "causal", rows_mask=head.rows_mask
    )
    body = model.base_model(input_ids=batch.ids_BT, **arguments)
    hidden_BTD = getattr(body, "last_hidden_state", None)
    if not isinstance(hidden_BTD, Tensor):
        return "its body gives no last_hidden_state"
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.positions_N)
    hidden_ND = head.transform(model, hidden_ND)
    if head.joined is None:
        found_NV = head.map.of(model.get_submodule(head.projection)(hidden_ND))
    else:
        found_NV = head.joined.projection(model)(hidden_ND)
    theirs_NV = theirs_BTV.flatten(0, 1).index_select(0, batch.positions_N)
    if found_NV.shape != theirs_NV.shape:
        return f"they have the shape {list(found_NV.shape)}"
    if _close(found_NV, theirs_NV):
        return None
    apart = (found_NV - theirs_NV).abs().max().item()
    return f"they are apart by {apart:.2g}, where the largest is {theirs_NV.abs().max().item():.2g}"


def _close(found: Tensor, wanted: Tensor, tolerance: float = _TOLERANCE) -> bool:
    finite = bool(found.isfinite().all() and wanted.isfinite().all())
    return finite and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
