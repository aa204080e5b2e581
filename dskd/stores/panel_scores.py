"""The teachers of a panel as a run names them: which classes and rows are theirs, and the stores of
what they say of each row.

Shape letters: R rows, n teachers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dskd.data.prepared import Prepared, RowSet, open_prepared, prepare
from dskd.data.views import Reader, View
from dskd.errors import ConfigError, DskdError
from dskd.models.configs import classes_in, config_of
from dskd.models.frozen import frozen_model
from dskd.settings.data import PretrainedTokenizer
from dskd.settings.folders import cache_folder
from dskd.settings.model import Model
from dskd.settings.run import Run
from dskd.settings.teachers import PanelMember, PanelTeacher, each_teacher, section_name
from dskd.stores.dropout_scores import (
    dropout_fields,
    drops_by_row,
    layout_of,
    score,
    with_dropout,
)
from dskd.stores.fingerprints import expected
from dskd.stores.uncertainty import (
    PanelPresence,
    StoredPanel,
    Uncertainty,
    UncertaintyLayout,
)
from dskd.system import dist
from dskd.system.device import free_memory
from dskd.system.files import fingerprint

Part = Literal["train", "validation"]
"""Rows that teachers are asked about; each part has a store of its own."""


@dataclass(frozen=True)
class Panelist:
    """One teacher of a run's panel.

    Attributes:
        name: in the settings.
        where: dotted name of its section there.
        settings: that section.
        model: to build, with the dropout of the panel in its config.
        prepared: the rows in the tokens that it reads.
        labels: names of its classes, in the order of its logits.
        layout: of its stores.
    """

    name: str
    where: str
    settings: PanelMember
    model: Model
    prepared: Prepared
    labels: tuple[str, ...]
    layout: UncertaintyLayout

    def rows(self, part: Part) -> RowSet:
        """The rows of a part."""
        return self.prepared.train if part == "train" else self.prepared.validation

    def build(self, run: Run, device: torch.device) -> nn.Module:
        """The frozen model, a classifier of its own classes (collective)."""
        own = replace(self.prepared, classes=None)
        return frozen_model(run, self.settings, self.model, f"{self.where}.model", own, device)


def panelists(run: Run, prepared: Prepared) -> list[Panelist]:
    """The teachers of the run's panel, in order (collective).

    Raises:
        ConfigError: a model has no dropout for several passes, does not say what its classes are,
            or has another number of them than the settings name.
    """
    found = []
    for name, member in each_teacher(run.teacher).items():
        where = section_name(name)
        own = _in_own_tokens(run, member, where) if member.own_tokenizer else prepared
        with dist.agreed():
            found.append(_panelist(run, where, name, member, own))
    return found


def _in_own_tokens(run: Run, member: PanelMember, where: str) -> Prepared:
    """The rows in the tokens of a teacher's folder (collective)."""
    model = member.model
    tokenizer = PretrainedTokenizer(
        kind="pretrained",
        path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    data = run.data.model_copy(update={"tokenizer": tokenizer})
    try:
        folder = dist.on_rank0(lambda: open_prepared(prepare(data)).folder)
    except DskdError as problem:
        raise type(problem)(f"{where}.own_tokenizer: {problem}") from problem
    with dist.agreed():
        return open_prepared(folder, verify=False)


def _panelist(run: Run, where: str, name: str, member: PanelMember, prepared: Prepared) -> Panelist:
    """The teacher, whose ``prepared`` rows are in the tokens that it reads."""
    panel = run.teacher
    config = config_of(member.model, where=f"{where}.model", tokenizer=prepared.tokenizer)
    labels = _labels(member, classes_in(config), where)
    model = member.model
    if panel.dropout is not None:
        fields = dict.fromkeys(dropout_fields(config), panel.dropout)
        model = model.model_copy(update={"config": {**model.config, **fields}})
        config = with_dropout(config, panel.dropout)
    by_passes = panel.scores == "live" and panel.confidence == "passes" and panel.passes > 1
    if by_passes and not drops_by_row(config):
        raise ConfigError(
            f"{where}.model: dropout of a {config.model_type} depends on which rows are together, "
            f"so scores by {panel.passes} passes would depend on train.micro_batch; set "
            f"teacher.scores to stored"
        )
    layout = layout_of(
        config,
        labels,
        passes=panel.passes if panel.asks_passes else 1,
        dropout=panel.dropout,
        seed=run.seed,
        micro_batch=panel.micro_batch,
        at_once=panel.at_once,
        where=f"{where}.model",
    )
    return Panelist(name, where, member, model, prepared, tuple(labels), layout)


def _labels(member: PanelMember, named: list[str], where: str) -> list[str]:
    """The names of a teacher's classes, by the settings or else by its config."""
    if member.labels is not None:
        if len(member.labels) != len(named):
            raise ConfigError(
                f"{where}.labels: {len(member.labels)}, but the model tells {len(named)} classes "
                f"apart"
            )
        return member.labels
    if any(name == f"LABEL_{number}" for number, name in enumerate(named)):
        raise ConfigError(
            f"{where}.labels: missing; the config of its model has no names of classes "
            f"({', '.join(named[:3])} ...), so name them here in the order of its logits"
        )
    return named


def heard(run: Run, prepared: Prepared) -> NDArray[np.bool_] | None:
    """Which teachers are asked about the rows of each domain, bool [domains, n]; None: all.

    Raises:
        ConfigError: a domain of the rows has no teacher.
    """
    members = each_teacher(run.teacher).values()
    if all(member.domains is None for member in members):
        return None
    found_Dn = np.array(
        [[m.domains is None or domain in m.domains for m in members] for domain in prepared.domains]
    )
    for domain, here_n in zip(prepared.domains, found_Dn, strict=True):
        if not here_n.any():
            raise ConfigError(f"teacher.teachers: none is asked about the domain {domain!r}")
    return found_Dn


def fill_scores(
    run: Run,
    views: Mapping[Part, View],
    found: list[Panelist],
    device: torch.device,
    *,
    verify: bool,
) -> None:
    """Ask each teacher about all rows of these parts, one teacher after the other, as far as they
    have not been (collective).

    Args:
        views: what the teachers see of the parts' rows.
        found: of :func:`panelists`.
        verify: read complete stores whole, because nobody will open them.

    Raises:
        ConfigError, StoreError, NonFiniteError: see :func:`~dskd.stores.dropout_scores.score`.
    """
    panel = run.teacher
    assert isinstance(panel, PanelTeacher), panel
    for index, each in enumerate(found):
        built: list[nn.Module] = []  # once for all parts

        def model(each: Panelist = each, built: list[nn.Module] = built) -> nn.Module:
            if not built:
                built.append(each.build(run, device))
            return built[0]

        for part, view in views.items():
            score(
                model,
                each.rows(part),
                view,
                _folder(run, each, part),
                each.layout,
                fingerprints=_prints(run, each, part, view),
                seed=run.seed,
                micro_batch=panel.micro_batch,
                at_once=panel.at_once,
                rows_per_shard=panel.rows_per_shard,
                device=device,
                where=f"{each.where}.model",
                present_R=_asked(run, each, part, index),
                verify=verify,
            )
        del model
        built.clear()
        free_memory()  # before the next teacher: a sharded one is in cycles of references


def score_readers(
    run: Run, view: View, found: list[Panelist], part: Part, *, confident: bool
) -> tuple[Reader, ...]:
    """What adds the teachers' stored scores of a part's rows to batches (collective).

    Args:
        view: what the teachers saw of these rows.
        found: of :func:`panelists`.
        confident: see :class:`~dskd.stores.uncertainty.StoredPanel`.

    Raises:
        StoreError: a store is missing, damaged, or of another teacher, tokenizer or rows.
    """
    stores = _opened(run, view, found, part)
    with dist.agreed():
        heard_Dn = heard(run, found[0].prepared)
    panel = StoredPanel(stores, confident=confident, heard_Dn=heard_Dn)
    return (panel,) if heard_Dn is None else (PanelPresence(heard_Dn), panel)


def _opened(run: Run, view: View, found: list[Panelist], part: Part) -> list[Uncertainty]:
    """The teachers' complete stores of a part, each rank verifying its share (collective)."""
    wanted = [_prints(run, each, part, view) for each in found]
    share = (dist.rank(), dist.world())
    with dist.agreed():
        return [
            Uncertainty(_folder(run, each, part), prints, share, each.layout)
            for each, prints in zip(found, wanted, strict=True)
        ]


def _folder(run: Run, each: Panelist, part: Part) -> Path:
    return cache_folder(run, each.name) / part


def _prints(run: Run, each: Panelist, part: Part, view: View) -> dict[str, str]:
    # The domains by name: by whose rows are asked about, a store is whole or not.
    about = {"data": each.rows(part).fingerprint, "domains": fingerprint(each.settings.domains)}
    return expected(run, each.settings, each.prepared, view, each.where) | about


def _asked(run: Run, each: Panelist, part: Part, index: int) -> NDArray[np.bool_] | None:
    """Which rows a teacher is asked about, bool [R]; None: all."""
    heard_Dn = heard(run, each.prepared)
    if heard_Dn is None:
        return None
    rows = each.rows(part)
    return heard_Dn[rows.domains_B(np.arange(len(rows))), index]
