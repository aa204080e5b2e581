"""The annealed rule: exact zeros on schedule, kept entries untouched, any sharding, any resume."""

import json
import math

import pytest
import torch

from dskd.errors import CheckpointError
from dskd.narrowing.rules import Annealed
from dskd.narrowing.units import ramp_end
from tests.narrowing.toy import COMPACTORS, GROUPS, SHAPES, SIDES, Toy, identity, of_units
from tests.ranks import run_ranks

EVERY, RAMP, ANNEAL = 3, 4, 5
LAST = EVERY * RAMP + ANNEAL - 1
SHARES, COPIES = ((0.0, 0.31), (0.31, 1.0)), ((0.0, 1.0), (0.0, 1.0))


def rule(**options):
    return Annealed(GROUPS, **{"every": EVERY, "ramp": RAMP, "anneal": ANNEAL, **options})


def removed_entries(rule, name):
    """Which entries of a compactor are removed, bool of its shape."""
    (group,) = (group for group, sides in SIDES.items() if name in sides)
    return of_units(~rule.keep[group], name).expand(SHAPES[name])


def run(rules, toy, steps, shares=((0.0, 1.0),)):
    return [toy.step(rules, step, 1e-3, shares) for step in steps]


def test_the_ramp():
    annealed, toy = rule(), Toy()
    sizes, changes = [], []
    for step in range(LAST):
        before = annealed.keep
        (changed,) = toy.step([annealed], step, 1e-3)
        keep = annealed.keep.items()
        assert set(changed) == {name for name, k in keep if not torch.equal(k, before[name])}
        for group, keep_U in annealed.keep.items():
            assert not (keep_U & ~before[group]).any()  # never taken back
        sizes.append(tuple(annealed.kept().values()))
        changes.append(changed)
    # R loses 4 in two chunks (k / 4 of 2 each: .5 1 1.5 2, halves up), A loses 2
    grown = {2: (4, 3), 5: (4, 3), 8: (2, 2), 11: (2, 2), 15: (2, 2)}
    assert {step: sizes[step] for step in grown} == grown
    assert [step for step, changed in enumerate(changes) if changed] == [2, 8]
    chunk_sizes = annealed.keep["R"].view(2, 3).sum(1).tolist()
    assert chunk_sizes == [1, 1]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_removed_entries_are_exactly_zero_and_kept_ones_untouched(decay):
    annealed, toy, plain = rule(), Toy(decay=decay), Toy(decay=decay)
    for step in range(LAST + 10):
        toy.step([annealed], step, 1e-3)
        plain.step([], step, 1e-3, shares=[])
        assert annealed.settled(step + 1) == (step + 1 >= 9 + ANNEAL - 1)  # the last go at t = 9
    for name, value in toy.values().items():
        removed = torch.zeros_like(value, dtype=torch.bool)
        if name in COMPACTORS:
            removed = removed_entries(annealed, name)
            assert torch.count_nonzero(value[removed]) == 0
            assert removed.any()
            assert torch.equal(value, identity(name) + toy.parameters[name])
        kept, wanted = toy.parameters[name][~removed], plain.parameters[name][~removed]
        assert torch.equal(kept, wanted)  # bit for bit
    assert annealed.removed_norm(toy.weights()) == 0.0


def test_removed_entries_follow_the_schedule():
    annealed, toy = rule(), Toy()
    history = [toy.values()]
    for step in range(LAST):
        toy.step([annealed], step, 1e-3)
        history.append(toy.values())
    for group, sides in SIDES.items():
        for unit, t in enumerate(annealed.removed_at[group].tolist()):
            for name in sides if t else ():
                one_U = torch.arange(len(annealed.removed_at[group])) == unit
                its = of_units(one_U, name).expand(SHAPES[name])
                for age in range(ANNEAL + 1):
                    wanted = history[t - 1][name][its] * (1 - age / ANNEAL)
                    found = history[t - 1 + age][name][its]
                    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
                    assert age < ANNEAL or not found.any()


def test_the_lowest_of_the_group_go():
    annealed, toy = rule(every=1, ramp=1, anneal=1), Toy()
    before = toy.values()
    score_U = torch.zeros(6, dtype=torch.float64)
    for name, side in SIDES["R"].items():
        square = before[name] ** 2
        score_U += square.sum(1) if side == "right" else square.view(-1, 6).sum(0)
    toy.step([annealed], 0, 1e-3)
    lowest = [i for chunk in (0, 3) for i in chunk + score_U[chunk : chunk + 3].argsort()[:2]]
    assert annealed.keep["R"].logical_not().nonzero()[:, 0].tolist() == sorted(map(int, lowest))
    assert annealed.settled(1)  # anneal 1: zero after the very step
    assert annealed.removed_norm(toy.weights()) == 0.0


def test_a_removed_unit_stays_though_others_are_lower():
    annealed, toy = rule(every=1, ramp=2, anneal=50), Toy()
    toy.step([annealed], 0, 1e-3)
    (first,) = annealed.removed_at["A"].nonzero()[:, 0].tolist()
    with torch.no_grad():
        for name in SIDES["A"]:  # C: almost 0 but for the removed unit's
            its = removed_entries(annealed, name)
            toy.parameters[name].copy_(torch.where(its, 9.0, 1e-6) - identity(name))
    toy.step([annealed], 1, 1e-3)
    removed_at = annealed.removed_at["A"].tolist()
    assert removed_at[first] == 1
    assert sorted(removed_at) == [0, 0, 1, 2]


def test_a_removed_norm():
    annealed, toy = rule(), Toy()
    run([annealed], toy, range(4))
    square = 0.0
    for name in COMPACTORS:
        square += float((toy.values()[name][removed_entries(annealed, name)] ** 2).sum())
    assert annealed.removed_norm(toy.weights()) == pytest.approx(math.sqrt(square), rel=1e-12)
    assert square > 1


def test_pieces_give_the_same_bits_as_the_whole():
    whole, pieces = Toy(dtype=torch.float32), Toy(dtype=torch.float32)
    run([rule()], whole, range(LAST))
    changed = run([rule(), rule()], pieces, range(LAST), SHARES)
    assert all(first == second for first, second in changed)
    assert all(map(torch.equal, whole.state(), pieces.state()))


@pytest.mark.parametrize("stop", [3, 7, 9, 11])
def test_resumed_in_the_ramp_it_goes_on_bit_for_bit(stop):
    through, toy = rule(), Toy(dtype=torch.float32)
    run([through], toy, range(stop))
    resumed, again = rule(), toy.copy()
    run([resumed], Toy(dtype=torch.float32), range(4))  # of which nothing may stay
    resumed.restore(json.loads(json.dumps(through.state())))
    run([through], toy, range(stop, LAST))
    run([resumed], again, range(stop, LAST))
    assert all(map(torch.equal, toy.state(), again.state()))
    assert through.state() == resumed.state()
    assert resumed.settled(LAST)


def test_what_a_state_holds():
    annealed = rule()
    state = {"removed": {"R": {"3": [0, 4], "9": [2]}, "A": {}}}
    annealed.restore(state)
    assert annealed.keep["R"].tolist() == [False, True, False, True, False, True]
    assert annealed.removed_at["R"].tolist() == [3, 0, 9, 0, 3, 0]
    assert annealed.kept() == {"R": 3, "A": 4}
    assert annealed.state() == state


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"R": {}}, r"masks of the groups R; this student has A, R"),
        ({"R": {"3": [6]}, "A": {}}, r"mask of R: removes units it has not, of 6"),
    ],
)
def test_a_foreign_state_is_refused(removed, message):
    with pytest.raises(CheckpointError, match=message):
        rule().restore({"removed": removed})


def test_the_end_comes_when_foretold():
    """R's last unit of a chunk goes at k = 12 of 16, A's at 12: 1.5 of 2, rounded up."""
    annealed, toy = Annealed(GROUPS, every=2, ramp=16, anneal=3), Toy()
    end = max(ramp_end(units.cut, 2, 16) for units in GROUPS.values()) + annealed.anneal - 1
    assert end == 26
    settled = []
    for step in range(end):
        toy.step([annealed], step, 1e-3)
        settled.append(annealed.settled(step + 1))
        assert annealed.complete(step + 1, toy.weights()) == settled[-1]
    assert settled == [False] * (end - 1) + [True]


def _state_and_norm(rank, shares, more=0.0):
    """Of a rank whose scores are not rank 0's, if there is ``more``."""
    annealed, toy = rule(), Toy()
    toy.parameters["stream.right"].data[[1, 5]] += more * rank
    run([annealed], toy, range(4), [shares[rank]])
    return annealed.state(), annealed.removed_norm(toy.weights(shares[rank])).item()


def test_all_ranks_take_rank_0s_masks():
    alone = [_state_and_norm(rank, COPIES, 3.0)[0] for rank in (0, 1)]
    assert alone[0] != alone[1]
    found = run_ranks(_state_and_norm, COPIES, 3.0)
    assert [state for state, _ in found] == [alone[0], alone[0]]


@pytest.mark.parametrize("shares", [COPIES, SHARES], ids=["copies", "pieces"])
def test_ranks_have_the_norm_of_one(shares):
    state, norm = _state_and_norm(0, COPIES)
    for its_state, its_norm in run_ranks(_state_and_norm, shares):
        assert its_state == state
        assert its_norm == pytest.approx(norm, rel=1e-12)
