"""A student that starts as a larger model cut to its heaviest units, written once as a folder.

``model.slice`` is the cheap relative of Weight-Inherited Distillation and the control it is to be
measured against: the units with the largest weights stay as they are, nothing is merged.
The folder is a HuggingFace model like any other, so whatever loads a ``path`` loads it.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dskd.errors import ConfigError
from dskd.models.build import with_fields
from dskd.models.frozen import model_of
from dskd.models.writing import export
from dskd.narrowing.heaviest import slice_model
from dskd.narrowing.layouts import LAYOUTS, layout_of, widths_of
from dskd.narrowing.narrow import narrowed_config
from dskd.narrowing.widths import Target, Widths, student_widths
from dskd.settings.folders import folder_of, source_settings
from dskd.settings.model import Model, Slice
from dskd.settings.run import Run
from dskd.system import dist

_SLICED = (
    "hidden_size", "intermediate_size", "n_inner", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings",
)  # fmt: skip
"""Fields of a config that a cut sets."""


def sliced_config(config: PreTrainedConfig, model: Model) -> PreTrainedConfig:
    """The student's config, given that of the model it is cut from.

    Raises:
        ConfigError: a family whose units are not known, or sizes that it cannot be cut to; names
            the setting and the nearest sizes that it can. Own fields of the config that the cut
            sets, or that its family does not have or refuses.
    """
    assert model.slice is not None
    narrow = narrowed_config(config, _widths(config, model.slice))
    names = config.attribute_map
    cut = {names.get(name, name) for name in _SLICED}
    for name in model.config:
        if names.get(name, name) in cut:
            raise ConfigError(f"model.config.{name}: model.slice sets it; leave it out")
    return with_fields(narrow, model.config, "model")


def _widths(config: PreTrainedConfig, cut: Slice) -> Widths:
    if config.model_type not in LAYOUTS:
        raise ConfigError(
            f"model.slice: cannot cut a {config.model_type}, only {', '.join(LAYOUTS)}"
        )
    target = Target(**cut.model_dump(), section="model.slice")
    return student_widths(widths_of(config), target, layout_of(config).demands)


def make_slice(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut the model and write the folder, which is then whole (collective).

    Every rank holds the larger model once, in fp32 on the CPU.

    Raises:
        ConfigError: as :func:`sliced_config` and ``models.build.build`` do.
        DskdError: the folder cannot be written.
    """
    cut = run.model.slice
    assert cut is not None
    with dist.agreed():
        source = model_of(run, source_settings(run), "model", tokenizer, None, "fp32")
        student = slice_model(source, _widths(source.config, cut), cut.strategy)
    card = {
        "title": "A language model cut to its heaviest units by dskd, not trained since",
        "source": run.model.path,
        "slice": cut.model_dump(mode="json"),
    }
    export(student, tokenizer, folder_of(run).sliced, card=card)
