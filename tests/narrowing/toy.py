"""Compactors without a model: parameters, groups, gradients drawn by the step, and pieces of them.

Group ``R`` has 6 units: a left compactor, a right one and a stack of two left ones, and a norm.
Group ``A`` has 4: a left and a right one, a left one with 2 entries a unit, and a stacked bias.
"""

import copy

import torch

from dskd.engine.shards import ParameterShards, Shard
from dskd.narrowing.units import Member, Units, Vector
from dskd.narrowing.widths import Cut

SHAPES = {
    "stream.left": (6, 6), "stream.right": (6, 6), "stack.left": (2, 6, 6),
    "heads.left": (4, 4), "heads.right": (4, 4), "wide.left": (8, 8),
    "norm": (6,), "bias": (8,), "base": (4, 6),
}  # fmt: skip
SIDES = {
    "R": {"stream.left": "left", "stream.right": "right", "stack.left": "left"},
    "A": {"heads.left": "left", "heads.right": "right", "wide.left": "left"},
}
COMPACTORS = [*SIDES["R"], *SIDES["A"]]
GROUPS = {
    "R": Units(
        Cut(6, 4, chunks=2),
        tuple(Member(*member) for member in SIDES["R"].items()),
        ranking="stack.left",
        part=1,
        vectors=(Vector("norm"),),
    ),
    "A": Units(
        Cut(4, 2, pace="heads"),
        tuple(Member(*member) for member in SIDES["A"].items()),
        ranking="wide.left",
        vectors=(Vector("bias", parts=2),),
    ),
}


def identity(name):
    """What is added to a parameter to get its value: I for compactors."""
    shape = SHAPES[name]
    return torch.eye(shape[-1]).expand(shape) if name in COMPACTORS else torch.zeros(shape)


def drawn(seed, scale=1.0, dtype=torch.float64):
    """A tensor for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in SHAPES.items()
    }


class Pieces(ParameterShards):
    """A plain student's weights as one of several ranks would hold them: a share of each."""

    def __init__(self, parameters, optimizer, *, gradients, share=(0.0, 1.0)):
        super().__init__(parameters, optimizer, gradients=gradients)
        self.share = share
        self.spread = share != (0.0, 1.0)

    @property
    def groups(self):
        """Each rank has its own; here only the first may change those of the one optimiser."""
        return super().groups if self.share[0] == 0 else []

    def shard(self, name):
        whole = super().shard(name)
        start, end = (round(end * whole.weight.numel()) for end in self.share)

        def cut(values):
            return None if values is None else values[start:end]

        moments = {key: cut(values) for key, values in whole.moments.items()}
        gradient = cut(whole.gradient)
        return Shard(name, whole.shape, start, cut(whole.weight), gradient, moments)


class Toy:
    """Parameters of small random values under torch's AdamW; compactors at ten times the rate."""

    def __init__(self, *, decay=0.0, dtype=torch.float64, eps=1e-6, betas=(0.9, 0.999)):
        values = drawn(1, 0.05, dtype)
        self.parameters = {name: torch.nn.Parameter(value) for name, value in values.items()}
        compactors = [self.parameters[name] for name in COMPACTORS]
        others = [p for name, p in self.parameters.items() if name not in COMPACTORS]
        groups = [{"params": compactors, "scale": 10.0}, {"params": others, "scale": 1.0}]
        self.optimizer = torch.optim.AdamW(groups, eps=eps, betas=betas, weight_decay=decay)

    def step(self, rules, step, lr, shares=((0.0, 1.0),)):
        """One optimiser step, ``rules[i]`` on the share i; the groups each says it changed."""
        for name, gradient in drawn(1000 + step, dtype=self.parameters["base"].dtype).items():
            self.parameters[name].grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        changed = []
        for rule, share in zip(rules, shares, strict=True):
            pieces = Pieces(self.parameters, self.optimizer, gradients=True, share=share)
            changed.append(rule.before_step(pieces, step))
        self.optimizer.step()
        for rule, share in zip(rules, shares, strict=True):
            pieces = Pieces(self.parameters, self.optimizer, gradients=False, share=share)
            rule.after_step(pieces, step, lr)
        return changed

    def weights(self, share=(0.0, 1.0)):
        """What a rank holds after a step."""
        return Pieces(self.parameters, self.optimizer, gradients=False, share=share)

    def values(self):
        """Copies of C = I + D of compactors, and of the other parameters."""
        return {name: identity(name) + p.detach() for name, p in self.parameters.items()}

    def copy(self):
        """Another with the same parameters and optimiser state, as from a checkpoint."""
        other = Toy(dtype=self.parameters["base"].dtype)
        # deep, or both would step the same moments
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        with torch.no_grad():
            for name, parameter in other.parameters.items():
                parameter.copy_(self.parameters[name])
        return other

    def state(self):
        """Copies of all that a checkpoint would hold of it, as one flat list."""
        state = [p.detach().clone() for p in self.parameters.values()]
        for kept in self.optimizer.state.values():
            state += [value.clone() for value in kept.values()]
        return state


def of_units(values_U, name):
    """A unit's value at each entry of a parameter that belongs to it, broadcastable."""
    if name == "norm":
        return values_U
    if name == "bias":
        return values_U.repeat(2)
    values_K = values_U.repeat_interleave(SHAPES[name][-1] // len(values_U))
    return values_K[:, None] if name.endswith("right") else values_K
