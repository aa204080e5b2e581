"""Counts and selections against the original's arithmetic, and scores against closed forms."""

import pytest
import torch

from dskd.narrowing.units import (
    Member,
    Units,
    fold,
    lowest,
    norms,
    original_count,
    original_end,
    ramp_count,
    ramp_end,
    scores,
    spread,
)
from dskd.narrowing.widths import Cut
from tests.goldens import golden

GOLDEN = golden("wid")


def original_cuts(case):
    """The groups' cuts as the original takes them, reachable target or not."""
    hidden, heads, gone = case["H"], case["heads"], case["H"] - case["target"]
    chunked = Cut(hidden, gone, heads, "eighths")
    if case["strategy"] == "head":
        chunked = Cut(heads, gone // case["head_dim"], pace="heads")
    singles = {"T": Cut(hidden, gone), "F": Cut(4 * hidden, 4 * gone)}
    return {"R": chunked, "A": chunked, **singles}


@pytest.mark.parametrize(
    "case",
    GOLDEN["schedule"]["cases"],
    ids=lambda case: "-".join(str(case[key]) for key in ("H", "target", "strategy", "step")),
)
def test_original_counts(case):
    counts, suffixes = {}, {"eighths": "_per_head", "heads": "_heads", "sixteenths": ""}
    for name, cut in original_cuts(case).items():
        count = original_count(cut, case["step"], case["w_step"])
        counts[name + suffixes[cut.pace]] = count // cut.chunks
    assert counts == case["removed"]


@pytest.mark.parametrize("case", GOLDEN["mask_select"]["cases"], ids=["chunks", "ffn", "head"])
def test_original_masks(case):
    norm_U = torch.tensor(case["norm"], dtype=torch.float64)
    ((name, count),) = case["removed_count"].items()
    chunks = case["heads"] if name.endswith("_per_head") else 1
    removed_U = lowest(norm_U, count * chunks, chunks)
    assert removed_U.nonzero()[:, 0].tolist() == case["removed"]
    assert (~removed_U).int().tolist() == case["keep"]


def test_whole_heads_go_by_the_sum_of_their_norms():
    norm_K = torch.tensor([3.0, 0.1, 1.0, 1.0, 1.5, 1.5])  # sums 3.1, 2, 3; squares 9, 2, 4.5
    removed_U = lowest(fold(norm_K, 3), 1)
    assert removed_U.tolist() == [False, True, False]
    assert spread(removed_U, 6).tolist() == [False, False, True, True, False, False]


def test_ties_go_by_index():
    case = GOLDEN["mask_select"]["tie_case"]
    removed_U = lowest(torch.tensor(case["norm"]), case["removed_count"])
    assert removed_U.nonzero()[:, 0].tolist() == case["removed"]
    assert lowest(torch.ones(6), 4, chunks=2).tolist() == [True, True, False] * 2


def test_removed_units_stay_removed():
    removed_U = torch.tensor([False, False, True, False])
    again_U = lowest(torch.tensor([0.0, 1.0, 9.0, 0.0]), 2, removed_U=removed_U)
    assert again_U.tolist() == [True, False, True, False]


def test_golden_norms():
    case = GOLDEN["mask_select"]["norms"]
    compactor_KK = torch.tensor(case["C"], dtype=torch.float64)
    for side, name in (("left", "left_norm_dim0"), ("right", "right_norm_dim1")):
        wanted_K = torch.tensor(case[name], dtype=torch.float64)
        torch.testing.assert_close(norms(compactor_KK, side), wanted_K, rtol=1e-12, atol=0)


def test_original_end_is_the_first_step_with_all_removed():
    cuts = [Cut(768, gone, 12, "eighths") for gone in (576, 648)]
    cuts += [Cut(12, 9, pace="heads"), Cut(768, 576), Cut(768, 252)]
    ends = [original_end(cut, 500) for cut in cuts]
    assert ends == [4000, 4500, 9000, 8000, 8000]  # the first, third and fourth: spec, section 3.2
    for cut, end in zip(cuts, ends, strict=True):
        assert original_count(cut, end - 1, 500) < cut.remove == original_count(cut, end, 500)
    assert original_end(Cut(8, 0), 500) == 0


def test_default_ramp():
    counts = [ramp_count(Cut(20, 10), step, every=5, ramp=4) for step in (4, 5, 10, 15, 20, 999)]
    assert counts == [0, 3, 5, 8, 10, 10]  # 2.5 and 7.5: halves up
    assert ramp_count(Cut(16, 12, chunks=4), 5, every=5, ramp=4) == 4 * 1


@pytest.mark.parametrize("ramp", [1, 3, 16])
@pytest.mark.parametrize(
    "cut", [Cut(8, 0), Cut(8, 1), Cut(8, 7), Cut(64, 48), Cut(12, 8, chunks=4)], ids=str
)
def test_ramp_end_is_the_last_change(cut, ramp):
    counts = [ramp_count(cut, step, every=5, ramp=ramp) for step in range(5 * ramp + 20)]
    changes = [step for step in range(1, len(counts)) if counts[step] != counts[step - 1]]
    assert ramp_end(cut, 5, ramp) == max(changes, default=0)
    assert counts[-1] == cut.remove


def differences():
    """Compactors' D by name: two of K = 4, a stack of two, and one of K = 2."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"left": (4, 4), "right": (4, 4), "stack": (2, 4, 4), "narrow": (2, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_group_is_ranked_by_everything_that_would_be_lost():
    weights = differences()
    before = {name: weight.clone() for name, weight in weights.items()}
    sides = {"left": "left", "right": "right", "stack": "right", "narrow": "left"}
    members = tuple(Member(*member) for member in sides.items())
    units = Units(Cut(2, 1), members, ranking="left")
    found_U = scores(units, weights.__getitem__, "group")
    wanted = []
    for unit in (0, 1):
        total = 0.0
        for name, weight in weights.items():
            for matrix in weight.double().view(-1, *weight.shape[-2:]):
                compactor = matrix + torch.eye(len(matrix))
                for entry in range(len(matrix)):
                    if entry * 2 // len(matrix) == unit:
                        lost = compactor[entry] if sides[name] == "right" else compactor[:, entry]
                        total += sum(float(value) ** 2 for value in lost)
        wanted.append(total)
    torch.testing.assert_close(found_U, torch.tensor(wanted, dtype=torch.float64))
    for name, weight in before.items():
        assert torch.equal(weights[name], weight)  # ranking changes nothing


def test_the_original_ranks_by_one_part_of_one_compactor():
    weights = differences()
    units = Units(Cut(2, 1), (Member("stack", "left"),), ranking="stack", part=1)
    compactor = weights["stack"][1].double() + torch.eye(4)
    wanted_U = compactor.norm(dim=0).view(2, 2).sum(1)
    torch.testing.assert_close(scores(units, weights.__getitem__, "original"), wanted_U)
