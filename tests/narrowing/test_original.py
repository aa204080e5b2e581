"""The original rule, through torch's AdamW: golden steps, and a plain Adam of C beside it."""

import json
import math

import pytest
import torch

from dskd.engine.shards import Shard
from dskd.narrowing.rule import Held
from dskd.narrowing.rules import Original
from dskd.narrowing.units import Member, Units, Vector
from dskd.narrowing.widths import Cut
from tests.goldens import golden
from tests.narrowing.toy import (
    COMPACTORS,
    GROUPS,
    SHAPES,
    SIDES,
    Pieces,
    Toy,
    drawn,
    identity,
    of_units,
)

GOLDEN = golden("wid")["penalty_adamw"]
SHARES = {"whole": ((0.0, 1.0),), "two": ((0.0, 0.31), (0.31, 1.0))}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def golden_rule(case):
    """A rule at step 8 of one parameter ``p``, in the case's phase and with its mask."""
    keep = case.get("keep")
    size = len(keep) if keep is not None else len(case["p"])
    if case["side"] == "vector":
        members, vectors = (), (Vector("p"),)
    else:
        members, vectors = (Member("p", case["side"]),), ()
    rule = Original(
        {"G": Units(Cut(size, 0), members, ranking="p", vectors=vectors)},
        every=5 if case["phase"] == "mask" else 100,
        penalty=case["lam"],
        eps=case["eps"],
        decay={"p": case["weight_decay"]},
    )
    if keep is not None:
        removed = [unit for unit, kept in enumerate(keep) if not kept]
        rule.restore({"removed": {"G": {"5": removed}}})
    return rule


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda case: f"{case['side']}-{case['phase']}-{case['lam']}"
)
def test_golden_steps(case, shares):
    value = tensor(case["p"])
    start = torch.zeros_like(value) if case["side"] == "vector" else torch.eye(len(value))
    parameter = torch.nn.Parameter(value - start)
    parameter.grad = tensor(case["grad"])
    optimizer = torch.optim.AdamW(
        [parameter], case["lr"], (case["beta1"], case["beta2"]), weight_decay=0.0
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(7.0),
        "exp_avg": tensor(case["exp_avg"]),
        "exp_avg_sq": tensor(case["exp_avg_sq"]),
    }
    rules = [golden_rule(case) for _ in shares]
    for rule, share in zip(rules, shares, strict=True):
        pieces = Pieces({"p": parameter}, optimizer, gradients=True, share=share)
        assert rule.before_step(pieces, 7) == []
    torch.testing.assert_close(parameter.grad, tensor(case["grad_edited"]), **EXACT)
    optimizer.step()
    for rule, share in zip(rules, shares, strict=True):
        pieces = Pieces({"p": parameter}, optimizer, gradients=False, share=share)
        rule.after_step(pieces, 7, case["lr"])
    torch.testing.assert_close(start + parameter.detach(), tensor(case["p_new"]), **EXACT)
    moments = optimizer.state[parameter]
    torch.testing.assert_close(moments["exp_avg"], tensor(case["exp_avg_new"]), **EXACT)
    torch.testing.assert_close(moments["exp_avg_sq"], tensor(case["exp_avg_sq_new"]), **EXACT)


class Plain:
    """The spec's step (section 3.1) on whole C, with an Adam of its own."""

    def __init__(self, penalty, every, decay):
        self.penalty, self.every, self.decay = penalty, every, decay
        self.values = {name: identity(name) + value for name, value in drawn(1, 0.05).items()}
        self.m = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.v = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.removed = {"R": torch.zeros(6, dtype=bool), "A": torch.zeros(4, dtype=bool)}
        self.group = {name: group for group, sides in SIDES.items() for name in sides}
        self.group |= {"norm": "R", "bias": "A"}

    def masks(self, times):
        ranked = {"R": self.values["stack.left"][1], "A": self.values["wide.left"]}
        counts = {"R": min(4 * times // 16, 4), "A": min(times // 2, 2)}
        for group, compactor in ranked.items():
            size = len(self.removed[group])
            score = compactor.norm(dim=0).view(size, -1).sum(1).tolist()
            chunks = [range(3), range(3, 6)] if group == "R" else [range(4)]
            lowest = [
                unit
                for chunk in chunks
                for unit in sorted(chunk, key=score.__getitem__)[: counts[group] // len(chunks)]
            ]
            self.removed[group] = torch.tensor([unit in lowest for unit in range(size)])

    def edited(self, name, gradient, t):
        value, group = self.values[name], self.group.get(name)
        if t <= self.every:
            return gradient + value if name in COMPACTORS else gradient
        if group is None:
            return gradient
        removed = of_units(self.removed[group], name).expand_as(value)
        if self.penalty > 1:
            pull = 0.1 * (self.penalty - 1) * value * removed
            self.m[name] = 0.9 * self.m[name] + pull
        return torch.where(removed, min(self.penalty, 1) * value, gradient)

    def step(self, t, lr):
        if t % self.every == 0:
            self.masks(t // self.every)
        for name, loss_gradient in drawn(1000 + t - 1).items():
            value, gradient = self.values[name], self.edited(name, loss_gradient, t)
            self.m[name] = 0.9 * self.m[name] + 0.1 * gradient
            self.v[name] = 0.999 * self.v[name] + 0.001 * gradient**2
            rate = 10 * lr if name in COMPACTORS else lr
            value = value - rate * self.m[name] / (self.v[name].sqrt() + 1e-6)
            self.values[name] = value - rate * self.decay.get(name, 0) * value


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("penalty", [20.0, 0.5])
def test_a_run_equals_plain_adam_on_c(penalty, shares):
    decay = {name: 0.01 for name in [*COMPACTORS, "base"]}
    scaled = {name: 0.01 * (10 if name in COMPACTORS else 1) for name in decay}
    plain, toy = Plain(penalty, 2, decay), Toy()
    rules = [Original(GROUPS, every=2, penalty=penalty, eps=1e-6, decay=scaled) for _ in shares]
    changes = 0
    for step in range(40):
        lr = 1e-3 * math.sin(step / 10)  # 0 in the first step
        changed = toy.step(rules, step, lr, shares)
        plain.step(step + 1, lr)
        for rule, groups in zip(rules, changed, strict=True):
            assert groups == changed[0]
            for group, removed in plain.removed.items():
                assert torch.equal(rule.keep[group], ~removed)
        changes += len(changed[0])
        for name, value in toy.values().items():
            torch.testing.assert_close(value, plain.values[name], **EXACT)
    assert changes >= 4  # the masks did grow
    assert rules[0].kept() == {"R": 2, "A": 2}
    assert not rules[0].settled(40)


def test_resumed_from_its_json_it_goes_on_bit_for_bit():
    def rule():
        return Original(GROUPS, every=2, penalty=20.0, eps=1e-6, decay={})

    through, toy = rule(), Toy()
    for step in range(11):
        toy.step([through], step, 1e-3)
    resumed, again = rule(), toy.copy()
    state = json.loads(json.dumps(through.state()))
    resumed.restore(state)
    for step in range(11, 25):
        toy.step([through], step, 1e-3)
        again.step([resumed], step, 1e-3)
    assert all(map(torch.equal, toy.state(), again.state()))
    assert through.state() == resumed.state() != state


def test_a_16_bit_gradient_gets_the_rounded_penalty():
    weight = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).view(-1)
    gradient = torch.ones(4, dtype=torch.bfloat16)
    shard = Shard("p", torch.Size((2, 2)), 0, weight, gradient, {})
    rule = golden_rule({**GOLDEN["cases"][0], "keep": [1, 0], "lam": 1.0, "side": "left"})
    rule._edit([Held("G", "left", shard)], rule._pull)
    wanted = torch.tensor([1.0, 0.2, 1.0, 1.4]).bfloat16()
    assert torch.equal(gradient, wanted)


def test_complete_is_a_student_without_its_removed_units():
    """All masks chosen, and no removed unit larger than NEAR_ZERO, though most are exactly 0."""
    rule, toy = Original(GROUPS, every=2, penalty=20.0, eps=1e-6, decay={}), Toy()
    for step in range(32):  # the last mask at step 32, of 16
        assert not rule.chosen() and not rule.complete(step, toy.weights())
        toy.step([rule], step, 1e-3)
    assert rule.chosen() and not rule.complete(32, toy.weights())
    for size, complete in ((0.0, True), (0.0099, True), (0.0101, False)):
        _set_removed(rule, toy, size)
        assert rule.largest_removed(toy.weights()) == pytest.approx(size, rel=1e-9, abs=1e-15)
        assert rule.complete(32, toy.weights()) == complete


def _set_removed(rule, toy, size):
    """Removed units to 0, but one of group A to columns and rows of this norm."""
    for group, sides in SIDES.items():
        gone_U = ~rule.keep[group]
        one_U = torch.zeros_like(gone_U)
        one_U[gone_U.nonzero()[0, 0]] = group == "A"
        for name, side in sides.items():
            value = toy.values()[name]
            value[of_units(gone_U, name).expand(SHAPES[name])] = 0.0
            first = value[:, 0] if side == "right" else value[..., 0, :]
            ones = of_units(one_U, name).expand(SHAPES[name])
            first[ones[:, 0] if side == "right" else ones[..., 0, :]] = size
            toy.parameters[name].data.copy_(value - identity(name))
