"""An edit through the shards is the edit of a plain torch model, at every ZeRO stage."""

import pytest
import torch
from torch import Tensor, nn

from dskd.engine import shards
from dskd.engine.engine import Engine
from dskd.engine.shards import ParameterShards
from dskd.engine.zero import gathered
from dskd.system import dist
from tests.models.tiny import adamw, geometry
from tests.ranks import run_ranks

STEPS, MICRO, ROWS, WIDTH = 4, 2, 4, 7
LR, SCALE, DECAY, EPS, CLIP = 0.05, 0.25, 0.1, 1e-6, 1.0


class Student(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 13)
        self.second = nn.Linear(13, 3, bias=False)
        self.late = nn.Parameter(torch.zeros(5, 3))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)


class Toy(nn.Module):
    """An objective. ``late`` is used in the last micro-batch of a step only, as merged weights are.

    ``always``: in all of them, as parameters must be under ZeRO-3 (else its trace of modules
    breaks) and under ZeRO-2 with offload (else it adds what is left of the step before).
    """

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.student = Student()
        self.always = always

    def forward(self, rows_BD: Tensor, last: bool, loss: None = None) -> Tensor:
        """The sum over the rows, and a term of ``late`` in the last micro-batch."""
        values = self.student.second(torch.tanh(self.student.first(rows_BD)))
        loss = (values**2).sum() + values.sum()
        if last or self.always:
            loss = loss + float(last) * (self.student.late**3).sum()
        return loss


def groups_of(student: Student) -> list[dict]:
    """Three groups; the second has its own learning rate."""
    return [
        {"params": [student.first.weight], "weight_decay": DECAY},
        {"params": [student.second.weight, student.late], "weight_decay": 0.0, "lr_scale": SCALE},
        {"params": [student.first.bias], "weight_decay": 0.0},
    ]


def rows(step: int, micro: int, rank: int, world: int) -> Tensor:
    """A rank's rows of a micro-batch; together the same for any number of ranks."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(ROWS, WIDTH, generator=generator)[rank::world]


def marked(name: str, start: int, count: int) -> Tensor:
    """Which entries of a piece are edited: a third of the whole parameter's."""
    return (torch.arange(start, start + count) * 7 + len(name)) % 3 == 0


def edit_before(weights: ParameterShards, step: int) -> None:
    """Edits of gradient, moments, weight and eps, as a method might make them."""
    for group in weights.groups:
        group["eps"] = EPS * (1 + step)
    for shard in weights.shards():
        chosen = marked(shard.name, shard.start, len(shard.weight))
        shard.gradient[chosen] = 0.5 * shard.weight[chosen].to(shard.gradient.dtype)
        assert set(shard.moments) == ({"exp_avg", "exp_avg_sq"} if step else set())
        if step:
            shard.moments["exp_avg"][chosen] *= 0.3
            shard.moments["exp_avg_sq"][~chosen] *= 1.5
        shard.weight[chosen] *= 0.9


def edit_after(weights: ParameterShards) -> None:
    """Edits of the new weights."""
    for shard in weights.shards():
        assert shard.gradient is None
        shard.weight[marked(shard.name, shard.start, len(shard.weight))] -= 0.01
    weights.publish()


def settings(stage: int, precision: str, world: int, offload: bool, robin: bool) -> dict:
    """A DeepSpeed config; ZeRO-3 keeps the two smaller parameters whole, ``robin`` changes the
    order at ZeRO-2.

    An offloaded optimizer measures the gradient before the edits, so it does not clip.
    """
    zero = {"stage": stage, "round_robin_gradients": robin}
    zero["stage3_param_persistence_threshold"] = 20
    ds = geometry(world, MICRO, ROWS) | adamw(zero, offload, precision == "bf16", lr=LR, eps=EPS)
    return ds | {"gradient_clipping": 0.0 if offload else CLIP}


def trained(
    rank: int, stage: int, precision: str, world: int, offload: bool = False, robin: bool = False
) -> tuple[dict, dict, int]:
    """Whole masters, the weights that the model computes with, and entries that this rank holds."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    toy = Toy(always=stage == 3 or offload).to(dtype)
    groups = groups_of(toy.student)
    engine = Engine(toy, groups, settings(stage, precision, world, offload, robin), monitor=False)
    for step in range(STEPS):
        for micro in range(MICRO):
            rows_BD = rows(step, micro, rank, world).to(dtype)
            last = micro == MICRO - 1
            engine.backward(engine.forward(rows_BD, last), last)
        engine.set_rate(LR / (1 + step))
        edit_before(engine.weights(gradients=True), step)
        assert engine.step()
        edit_after(engine.weights(gradients=False))
    weights = engine.weights(gradients=False)
    held = sum(len(shard.weight) for shard in weights.shards())
    masters = {name: weights.whole(name).tolist() for name, _ in toy.student.named_parameters()}
    with gathered(toy.parameters()):
        used = {name: p.tolist() for name, p in toy.student.named_parameters()}
    return masters, used, held


def plain(world: int, clip: float = CLIP) -> dict[str, Tensor]:
    """The same by torch alone."""
    toy = Toy()
    parameters = dict(toy.student.named_parameters())
    groups = groups_of(toy.student)
    scales = [group.pop("lr_scale", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99), eps=EPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO):
            for rank in range(world):
                toy(rows(step, micro, rank, world), micro == MICRO - 1).backward()
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = LR / (1 + step) * scale
        edit_before(ParameterShards(parameters, optimizer, gradients=True), step)
        if clip:
            nn.utils.clip_grad_norm_(toy.parameters(), clip)
        optimizer.step()
        edit_after(ParameterShards(parameters, optimizer, gradients=False))
    return {name: parameter.detach() for name, parameter in parameters.items()}


ROBIN = [(2, True)]
STAGES = [(stage, False) for stage in (0, 1, 2, 3)]


IN_PLACE = [(*place, world, False) for place in STAGES + ROBIN for world in (1, 2)]
OFFLOADED = [(*place, 2, True) for place in STAGES[1:] + ROBIN]


@pytest.mark.parametrize(("stage", "robin", "world", "offload"), IN_PLACE + OFFLOADED)
def test_edits_are_those_of_a_plain_model(stage, robin, world, offload):
    expected = plain(world, clip=0.0 if offload else CLIP)
    total = sum(p.numel() for p in Student().parameters())
    found = run_ranks(trained, stage, "fp32", world, offload, robin, world=world)
    for masters, used, _ in found:
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(masters[name]), value, rtol=1e-6, atol=1e-6)
            assert masters[name] == used[name]
    held = [count for _, _, count in found]
    assert sum(held) == (total if stage else total * world)  # every entry once


BF16 = [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize(
    ("stage", "world", "robin"), [(*place, False) for place in BF16] + [(2, 1, True), (2, 2, True)]
)
def test_bf16_publishes_what_was_edited(stage, world, robin):
    """Masters keep 24 bits of the edits; the model computes with them rounded."""
    expected = plain(world)
    for masters, used, _ in run_ranks(trained, stage, "bf16", world, False, robin, world=world):
        for name, value in expected.items():
            master = torch.tensor(masters[name])
            torch.testing.assert_close(master, value, rtol=0.05, atol=0.05)
            assert torch.equal(master.bfloat16(), torch.tensor(used[name]).bfloat16())
            assert not torch.equal(master.bfloat16().float(), master)


def _gathered(rank: int, stage: int) -> tuple[dict, dict, int]:
    """Weights put together one by one and together, and how many collectives the latter took."""
    toy = Toy(always=True)
    ds = settings(stage, "fp32", 2, offload=False, robin=False)
    engine = Engine(toy, groups_of(toy.student), ds, monitor=False)
    weights = engine.weights(gradients=False)
    names = [name for name, _ in toy.student.named_parameters()]
    one_by_one = {name: weights.whole(name).tolist() for name in names}
    calls, real = [], dist.sum_over_ranks
    shards._BUCKET, dist.sum_over_ranks = 90, lambda value: (calls.append(value), real(value))[1]
    together = {name: whole.tolist() for name, whole in weights.wholes(names)}
    return one_by_one, together, len(calls)


@pytest.mark.parametrize(("stage", "calls"), [(0, 0), (1, 2), (2, 2), (3, 0)])
def test_parameters_are_put_together_in_buckets(stage, calls):
    """15, 91, 13 and 39 entries, in buckets that are closed once they hold 90."""
    expected = {name: p.tolist() for name, p in Student().named_parameters()}
    for found in run_ranks(_gathered, stage, world=2):
        assert found == (expected, expected, calls)
