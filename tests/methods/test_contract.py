"""What every method of METHODS must hold, whatever it computes."""

import pytest
import torch
from torch import nn

from dskd.batch import IGNORE, DenseTeacher, Panel, Positions, ProjectedTeacher
from dskd.errors import ConfigError
from dskd.methods.base import METHODS, Method, build_method
from dskd.models.families import LinearProjection
from tests.batches import batch_of, changed
from tests.fused.plain_losses import top_k
from tests.heads import logits_of

VOCABULARY, WIDTH = 13, 6

CONSTANT = {"kind": "ki", "schedule": "constant", "rate": 0.5}
# Settings of each kind, at least one; a new method adds a line.
SETTINGS = {
    "ki": [
        {"kind": "ki", "steps": 10},
        {"kind": "ki", "schedule": "switch", "steps": 10, "rate": 0.7, "temperature": 1.0},
        {"kind": "ki", "schedule": "cosine", "steps": 10, "topk": "renormalised"},
        CONSTANT | {"temperature": 3.0, "topk": "truncated"},
    ],
    "lm": [{"kind": "lm"}],
    "self_evolution": [
        {"kind": "self_evolution"},
        {"kind": "self_evolution", "smoothing": 0.0},
        {"kind": "self_evolution", "smoothing": 1.0},
    ],
    "finetune": [{"kind": "finetune"}, {"kind": "finetune", "metric": "loss"}],
    "muki": [
        {"kind": "muki"},
        {"kind": "muki", "choice": "soft", "margin": False, "temperature": 2.0},
    ],
    "vkd": [{"kind": "vkd"}, {"kind": "vkd", "overlap": "mean", "temperature": 3.0}],
    "uhc": [{"kind": "uhc"}],
    "dfa": [{"kind": "dfa"}],
    "cfl": [{"kind": "cfl"}],
    "l2kd": [{"kind": "l2kd"}, {"kind": "l2kd", "word_kd": True, "text_weight": 0.5}],
    "wid": [
        {"kind": "wid", "hidden_size": 4},
        {"kind": "wid", "hidden_size": 4, "inherit": {"steps": 10, "rate": 0.5}},
    ],
}
OTHER_SIGNALS = dict.fromkeys(("muki", "vkd", "uhc"), ("panel",))
# What these add up is of tokens and of groups of rows too, of which a row has others besides its
# supervised position: tests/methods/test_dfa_cfl.py.
OTHER_SIGNALS |= dict.fromkeys(("dfa", "cfl"), ())
# Its terms are of positions that a reader sorts: tests/methods/test_l2kd.py.
OTHER_SIGNALS |= {"l2kd": ()}
CASES = [
    pytest.param(settings, signal, step, id=f"{kind}{i}-{signal}-step{step}")
    for kind, several in SETTINGS.items()
    for i, settings in enumerate(several)
    for signal in OTHER_SIGNALS.get(kind, ("dense", "topk", "projected"))
    for step in (0, 3, 10)
]


class Toy:
    """A student and a teacher without interaction between positions."""

    def __init__(self, kind):
        generator = torch.Generator().manual_seed(3)
        self.body = nn.Embedding(VOCABULARY, WIDTH)
        self.head = LinearProjection(WIDTH, VOCABULARY + 3)
        for parameter in (self.body.weight, self.head.weight, self.head.bias):
            nn.init.normal_(parameter, generator=generator)
        self.teacher = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.teacher_head = LinearProjection(WIDTH, VOCABULARY + 1)
        nn.init.normal_(self.teacher_head.weight, generator=generator)
        self.kind = kind

    def terms(self, method, batch, step):
        chosen_BT = batch.supervised_BT
        rows = Positions(self.body(batch.ids_BT)[chosen_BT], self.head, batch.labels_N)
        signal = None
        if method.needs_teacher(step):
            hidden_ND = self.teacher[batch.ids_BT[chosen_BT]]
            signal = ProjectedTeacher(hidden_ND, self.teacher_head, VOCABULARY)
            if self.kind == "dense":
                signal = DenseTeacher(logits_of(signal))
            if self.kind == "topk":
                signal = top_k(logits_of(signal), 4, method.temperature)
            if self.kind == "panel":
                own = [torch.arange(0, 8), torch.arange(5, VOCABULARY)]
                signal = Panel([logits_of(signal)[:, map_M] for map_M in own], own)
        return method.loss(rows, signal, batch, step)

    def gradients(self, terms):
        parameters = [self.body.weight, self.head.weight, self.head.bias]
        return torch.autograd.grad(sum(term.total for term in terms.values()), parameters)


def make_batch(rows=6, tokens=7):
    generator = torch.Generator().manual_seed(4)
    ids_BT = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    labels_BT = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    labels_BT[torch.rand(rows, tokens, generator=generator) < 0.6] = IGNORE
    return batch_of(labels_BT, ids_BT=ids_BT)


def padded(batch, columns=5):
    values = {"ids_BT": 0, "mask_BT": 0, "labels_BT": IGNORE}
    wider = {
        name: nn.functional.pad(getattr(batch, name), (0, columns), value=value)
        for name, value in values.items()
    }
    return changed(batch, **wider)


def numbers(terms):
    """Every total and part, by name."""
    totals = {name: term.total.item() for name, term in terms.items()}
    return totals | {part: v.item() for term in terms.values() for part, v in term.parts.items()}


def test_every_method_is_covered():
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize(("settings", "signal", "step"), CASES)
def test_terms_are_finite_sums_with_a_count_each(settings, signal, step):
    method, toy, batch = build_method(settings), Toy(signal), make_batch()
    terms, counts = toy.terms(method, batch, step), method.counts(batch)
    assert terms
    assert set(terms) <= set(counts) <= set(method.terms)
    for name, term in terms.items():
        assert all(part.isfinite() and not part.requires_grad for part in term.parts.values())
        assert term.total.dtype == torch.float32
        assert term.total.shape == ()
        assert term.total.isfinite()
        assert term.total.requires_grad
        assert isinstance(counts[name], float)
        assert counts[name] > 0
    assert all(g.isfinite().all() and g.any() for g in toy.gradients(terms))


@pytest.mark.parametrize(("settings", "signal", "step"), CASES)
def test_a_batch_is_the_sum_of_its_parts(settings, signal, step):
    method, toy, batch = build_method(settings), Toy(signal), make_batch()
    parts = [batch.select(torch.arange(*ends)) for ends in ((0, 1), (1, 4), (4, 6))]
    whole = toy.terms(method, batch, step)
    split = [toy.terms(method, part, step) for part in parts]
    for name, value in numbers(whole).items():
        assert value == pytest.approx(sum(numbers(terms)[name] for terms in split), rel=1e-5)
    for name, count in method.counts(batch).items():
        assert count == sum(method.counts(part)[name] for part in parts)
    pieces = zip(*(toy.gradients(terms) for terms in split), strict=True)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close([*map(sum, pieces)], [*toy.gradients(whole)], **close)


@pytest.mark.parametrize(("settings", "signal", "step"), CASES)
def test_padding_does_not_count(settings, signal, step):
    method, toy, batch = build_method(settings), Toy(signal), make_batch()
    found, wanted = (numbers(toy.terms(method, b, step)) for b in (padded(batch), batch))
    assert found == wanted
    assert method.counts(padded(batch)) == method.counts(batch)


@pytest.mark.parametrize(("settings", "signal", "step"), CASES)
def test_no_supervised_position_gives_zero_with_a_graph(settings, signal, step):
    method, toy, batch = build_method(settings), Toy(signal), make_batch()
    nothing = changed(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE))
    terms = toy.terms(method, nothing, step)
    assert set(terms) == set(toy.terms(method, batch, step))  # every rank has the same terms
    assert all(number == 0.0 for number in numbers(terms).values())
    assert all((gradient == 0).all() for gradient in toy.gradients(terms))
    assert all(count == 0 for count in method.counts(nothing).values())


@pytest.mark.parametrize(("settings", "signal", "step"), CASES)
def test_the_same_call_gives_the_same_bits(settings, signal, step):
    method, toy, batch = build_method(settings), Toy(signal), make_batch()
    first, second = (toy.terms(method, batch, step) for _ in range(2))
    assert numbers(first) == numbers(second)
    for a, b in zip(toy.gradients(first), toy.gradients(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [s for several in SETTINGS.values() for s in several], ids=str)
def test_settings_round_trip_and_are_frozen(settings):
    method = build_method(settings)
    assert build_method(method.model_dump(mode="json")) == method
    with pytest.raises(ValueError, match="frozen"):
        method.kind = "other"


@pytest.mark.parametrize("settings", [s for several in SETTINGS.values() for s in several], ids=str)
def test_a_method_that_never_wants_a_teacher_never_needs_one(settings):
    method = build_method(settings)
    assert method.wants_teacher() == any(method.needs_teacher(step) for step in range(20))
    assert not method.wants_teacher() or method.temperature > 0


@pytest.mark.parametrize("kind", METHODS)
def test_an_unknown_setting_is_refused_with_the_nearest_name(kind):
    settings = SETTINGS[kind][0] | {"kinds": 1}
    with pytest.raises(ConfigError, match=r"method\.kinds: no such setting; did you mean 'kind'"):
        build_method(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, rf"must name a method \({', '.join(METHODS)}\)"),
        ({"kind": 3}, r"must name a method"),
        (
            {"kind": "kii"},
            rf"'kii' is not one of {', '.join(METHODS)}; did you mean 'ki'\?",
        ),
        ({"kind": ":Class"}, r"':Class' is not of the form package\.module:Name"),
        ({"kind": "no.such:Class"}, r"no module 'no\.such'"),
        ({"kind": "dskd.methods.ki:Nope"}, r"'dskd\.methods\.ki' has no 'Nope'"),
        ({"kind": "dskd.batch:Positions"}, r"dskd\.batch:Positions is no method"),
    ],
)
def test_a_kind_that_names_nothing_is_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"method\.kind: {message}"):
        build_method(settings)


OUTSIDE = """
from dskd.batch import Term
from dskd.methods.base import Method
from dskd.ops import positions_kd


class JSD(Method):
    temperature: float = 1.0

    def wants_teacher(self):
        return True

    def needs_teacher(self, step):
        return True

    def loss(self, rows, signal, batch, step):
        losses = positions_kd(rows, signal, kind="jsd", temperature=self.temperature)
        return {"tokens": Term(losses.total, {"jsd": losses.divergence_N.sum()})}
"""


def test_a_method_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "outside_method.py").write_text(OUTSIDE)
    (tmp_path / "broken_method.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    method = build_method({"kind": "outside_method:JSD", "temperature": 2.0})
    assert isinstance(method, Method)
    assert build_method(method.model_dump(mode="json")) == method
    terms = Toy("dense").terms(method, make_batch(), 0)
    assert terms["tokens"].total == terms["tokens"].parts["jsd"] > 0
    fails = "method.kind: importing 'broken_method' fails: .*no_such_dependency"
    with pytest.raises(ConfigError, match=fails):
        build_method({"kind": "broken_method:JSD"})
