"""The settings' own fields of a model's config: laid on it, and seen to have had their effect.

HuggingFace's configs take much in silence: a name that the model type does not have, a value that
another one overrides, a scaling of rotary positions that resets their base. Here each is either to
be found in the config afterwards or is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dskd.data.foreign import raised_as
from dskd.errors import ConfigError
from dskd.settings.parsing import nearest, show

_SPECIALS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
_SET_BY_OTHERS = {
    "vocab_size": "comes from the tokenizer (and vocab_multiple)",
    **dict.fromkeys(_SPECIALS, "comes from the tokenizer"),
    **dict.fromkeys(("dtype", "torch_dtype"), "comes from the precision setting"),
    **dict.fromkeys(("num_labels", "id2label", "label2id", "problem_type"), "comes from the data"),
    "quantization_config": "weights are trained and stored as they are computed with",
}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
"""The names under which rotary positions are described; a config keeps them in the last."""


def random_config(
    model_type: str, own: dict[str, Any], given: dict[str, Any], where: str
) -> PreTrainedConfig:
    """The config of a random model.

    Args:
        model_type: a known one.
        own: the settings' fields.
        given: fields that are not the settings' to say.
        where: the setting of the fields, for messages.

    Raises:
        ConfigError: fields that the type does not have, values that it refuses or does not take up.
    """
    with raised_as(ConfigError, f"{where}: HuggingFace refuses it"):
        default = AutoConfig.for_model(model_type)
    fields = _named(own, default, where)
    with raised_as(ConfigError, f"{where}: HuggingFace refuses it"):
        config = AutoConfig.for_model(model_type, **copy.deepcopy(fields), **given)
    _refuse_dropped(config, own, fields, default, where)
    return config


def with_own(stored: PreTrainedConfig, own: dict[str, Any], where: str) -> PreTrainedConfig:
    """A stored config, with the settings' fields for it; raises as :func:`random_config` does."""
    fields = _named(own, stored, where)
    with raised_as(ConfigError, f"{where}: HuggingFace refuses it"):
        config = type(stored).from_dict({**stored.to_dict(), **copy.deepcopy(fields)})
    _refuse_dropped(config, own, fields, type(stored)(), where)
    return config


def known_fields(cls: type[PreTrainedConfig]) -> set[str]:
    """The fields that configs of a class have."""
    return {field.name for field in dataclasses.fields(cls)}


def _named(own: dict[str, Any], base: PreTrainedConfig, where: str) -> dict[str, Any]:
    """The fields by the config's names for them, what is said of rotary positions in one."""
    _refuse_unknown(own, type(base), where)
    names = type(base).attribute_map
    fields = {names.get(name, name): value for name, value in own.items() if name not in _ROPE}
    if rope := {name: own[name] for name in _ROPE if name in own}:
        fields["rope_parameters"] = _laid(base.rope_parameters, rope, where)
    return fields


def _refuse_unknown(own: dict[str, Any], cls: type[PreTrainedConfig], where: str) -> None:
    known = known_fields(cls) | set(cls.attribute_map)
    if "rope_parameters" in known:
        known |= set(_ROPE)
    problems = []
    for name in own:
        if name in _SET_BY_OTHERS:
            problems.append(f"{where}.{name}: {_SET_BY_OTHERS[name]}")
        elif name not in known:
            near = nearest(name, known)
            problems.append(f"{where}.{name}: a {cls.model_type} config has no such field{near}")
    if problems:
        raise ConfigError("\n".join(problems))


def _laid(stored: dict[str, Any], rope: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary positions of a config, with those of the settings laid on them."""
    if "rope_scaling" in rope and "rope_parameters" in rope:
        raise ConfigError(f"{where}.rope_scaling: means rope_parameters, which is there, too")
    name = "rope_scaling" if "rope_scaling" in rope else "rope_parameters"
    kinds = sorted(kind for kind, entry in stored.items() if isinstance(entry, dict))
    if not kinds:
        laid = _scaled(stored, rope[name], f"{where}.{name}") if name in rope else dict(stored)
        return laid | {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else laid
    if "rope_theta" in rope:
        place = f"{where}.rope_parameters.{kinds[0]}.rope_theta"
        raise ConfigError(f"{where}.rope_theta: each kind of layers has its own; set {place}")
    given = rope[name]
    if not (isinstance(given, dict) and set(given) <= set(kinds)):
        text = f"expected settings for one of {', '.join(kinds)}, found {show(given)}"
        raise ConfigError(f"{where}.{name}: {text}")
    scaled = {kind: _scaled(stored[kind], given[kind], f"{where}.{name}.{kind}") for kind in given}
    return {**stored, **scaled}


def _scaled(stored: dict[str, Any], given: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """Another scaling of rotary positions, null: none. Their base stays unless it is given."""
    if not (given is None or isinstance(given, dict)):
        raise ConfigError(f"{where}: expected settings (name: value) or null, found {show(given)}")
    given = dict(given or {})
    if given.get("partial_rotary_factor", 1) != 1:
        # Its class ignores it or fails by it; HuggingFace's configs take it all the same.
        raise ConfigError(f"{where}.partial_rotary_factor: this model turns whole heads")
    kind = given.pop("type", "default")  # the name of rope_type in older configs
    return {"rope_theta": stored["rope_theta"], "rope_type": kind, **given}


def _refuse_dropped(
    config: PreTrainedConfig,
    own: dict[str, Any],
    fields: dict[str, Any],
    default: PreTrainedConfig,
    where: str,
) -> None:
    """Refuse what is not to be found in the config that was made of it."""
    aliases = {type(config).attribute_map.get(name, name): name for name in own}
    for field, value in fields.items():
        if value is None and field not in ("rope_parameters",) and _is_filled(default, field):
            continue  # null means what HuggingFace then puts there
        found = getattr(config, field)
        if not _holds(_plain(found), _plain(value)):
            name = aliases.get(field, next((name for name in _ROPE if name in own), field))
            raise ConfigError(
                f"{where}.{name}: {show(own.get(name, value))} has no effect; "
                f"the {config.model_type} config made with it says {show(_plain(found))}"
            )


def _is_filled(default: PreTrainedConfig, field: str) -> bool:
    """Whether null is a field's default, for which the class may put in a value of its own."""
    declared = {f.name: f.default for f in dataclasses.fields(default)}
    return declared.get(field) is None


def _holds(found: Any, value: Any) -> bool:
    """Whether a value is there: all entries of a mapping, anything else as it is."""
    if isinstance(found, dict) and isinstance(value, dict):
        return all(key in found and _holds(found[key], value[key]) for key in value)
    return found == value


def _plain(value: Any) -> Any:
    """The value as JSON has it: keys are text, tuples lists, a config its fields."""
    if isinstance(value, PreTrainedConfig):
        value = value.to_dict()
    return json.loads(json.dumps(value, default=str))
