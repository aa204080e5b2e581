"""Tables of names: total and bijective, so that the way back exists."""

import pytest
import torch
from torch import nn

from dskd.convert import fairseq, gpt2, uer
from dskd.convert.names import NameTable, Row, fill, layers_of, renamed
from dskd.errors import ConfigError

TABLES = {
    "fairseq": fairseq.MASKED,
    "fairseq classes": fairseq.CLASSES,
    "gpt2": gpt2.TABLE,
    "uer 2022": uer.table_of("until 2023", "uer"),
    "uer 2023": uer.table_of("since 2023", "elsewhere"),
}


def written_out(pattern: str) -> set[str]:
    parts = ("weight", "bias") if "{p}" in pattern else ("",)
    numbers = (0, 3, 11) if "{n}" in pattern else (0,)
    return {pattern.format(n=n, p=p) for n in numbers for p in parts}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_a_bijection(name):
    table = TABLES[name]
    theirs = {one for row in table.rows for one in written_out(row.theirs)}
    ours = {one for row in table.rows for one in written_out(row.ours)}
    assert len(theirs) == len(ours) == sum(len(written_out(row.theirs)) for row in table.rows)
    there = {one: table.of_theirs(one) for one in theirs}
    assert None not in there.values()
    assert {found[0] for found in there.values()} == ours
    assert {one: table.of_ours(found[0]) for one, found in there.items()} == {t: t for t in theirs}
    for one in theirs:  # each is met by one row only
        assert sum(NameTable([row]).of_theirs(one) is not None for row in table.rows) == 1
    for one in ours:
        assert sum(NameTable([row]).of_ours(one) is not None for row in table.rows) == 1


SMALL = NameTable([Row("a.{n}.{p}", "{n}.{p}", lambda tensor: 2 * tensor)])


def small() -> dict[str, torch.Tensor]:
    return {f"a.{n}.{p}": torch.ones(3, 3 if p == "weight" else 1).squeeze() for n in (0, 1)
            for p in ("weight", "bias")}  # fmt: skip


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def test_all_tensors_are_changed_and_put_in():
    filled = model()
    fill(filled, renamed(small(), SMALL, "f"), SMALL, "f")
    assert all(bool((p == 2).all()) for p in filled.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b.0.weight": torch.ones(2)}, r"f: tensors that have no place in the model: b.0.weight"),
        ({"a.2.bias": torch.ones(3)}, r"f: tensors that have no place in the model: a.2.bias \[3"),
        ({"a.1.bias": None}, r"f: tensors are missing: a.1.bias \(HuggingFace's 1.bias\)"),
        ({"a.1.bias": torch.ones(4)}, r"a.1.bias is \[4\], the other tensors ask for \[3\]"),
        ({"a.1.bias": torch.tensor([1, torch.nan, 1])}, "a.1.bias holds numbers that are not fin"),
        ({"a.1.bias": torch.ones(3, dtype=torch.int8)}, "a.1.bias is torch.int8, torch.strided: c"),
        ({"a.1.weight": torch.ones(3, 3).to_sparse()}, "a.1.weight is torch.float32, torch.sparse"),
        ({"a.01.bias": torch.ones(3)}, "no place in the model: a.01.bias"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = {name: tensor for name, tensor in (small() | change).items() if tensor is not None}
    with pytest.raises(ConfigError, match=message):
        fill(model(), renamed(state, SMALL, "f"), SMALL, "f")


def test_layers_are_counted():
    assert layers_of(small(), "a.{n}", "f") == 2
    with pytest.raises(ConfigError, match=r"f: tensors are missing: a.1\.\*"):
        layers_of(["a.0.w", "a.2.w"], "a.{n}", "f")
    with pytest.raises(ConfigError, match=r"f: tensors are missing: a.0\.\*"):
        layers_of(["b.0.w"], "a.{n}", "f")
