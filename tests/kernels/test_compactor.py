"""The products that merge compactors, many layers at once, against float64 and plain torch."""

import pytest
import torch

from dskd.fused import compactor as public
from dskd.fused.backend import triton_everywhere
from dskd.fused.compactor import Factors, merge_layers, unmerge_layers
from dskd.fused.cpu import products
from dskd.kernels import compactor
from tests.kernels.cases import GPU, ROUNDING, close

SIZES = {"less than a tile": (5, 3), "odd": (70, 37), "even": (32, 64)}
LAYERS, PARTS = 2, 2
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


def random(*shape, dtype, device, scale=1.0, turned=False):
    """Batches of matrices or vectors, possibly read against their order in memory."""
    made = torch.randn(*shape, device=device) * scale
    made = made.mT.contiguous().mT if turned else made
    return made.to(dtype)


def kept(size, device):
    """About half of the units, each layer's own, in no order."""
    return [torch.randperm(size, device=device)[: size // 2 + 1] for _ in range(LAYERS)]


def compare(name, given, keeps, dtype, scale):
    """A product against the plain one in float64."""

    def in_double(value):
        return [t.double() for t in value] if isinstance(value, list) else value

    found = getattr(compactor, name)(*given, keeps)
    wanted = getattr(products, name)(*map(in_double, given), keeps)
    if not isinstance(found, tuple):
        found, wanted = (found,), (wanted,)
    for some, right in zip(found, wanted, strict=True):
        assert (some is None) == (right is None)
        for one, other in zip(some or [], right or [], strict=True):
            assert one.dtype == dtype
            close(name, one, other, ROUNDING[dtype] + 1e-5, 1e-5 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("some", [False, True], ids=["all", "kept"])
@pytest.mark.parametrize("size", SIZES)
def test_products(size, some, dtype, device):
    """All six; the weights lie as an nn.Linear's does and, if odd, as a Conv1D's as well."""
    outputs, inputs = SIZES[size]
    how = {"dtype": dtype, "device": device}
    outs = kept(outputs, device) if some else [None] * LAYERS
    ins = kept(inputs, device) if some else [None] * LAYERS
    n = len(outs[0]) if some else outputs
    k = len(ins[0]) if some else inputs

    def layers(*shape, **options):
        return [random(PARTS, *shape, **how, **options) for _ in range(LAYERS)]

    for turned in (False, True) if size == "odd" else (False,):
        weights = layers(outputs, inputs, turned=turned)
        rights, lefts = layers(outputs, outputs, scale=0.1), layers(inputs, inputs, scale=0.1)
        biases, of_biases = layers(outputs), layers(n)
        of_rows, of_columns = layers(n, inputs), layers(outputs, k)
        compare("right", (weights, biases, rights), outs, dtype, 10)
        compare("left", (weights, lefts), ins, dtype, 10)
        compare("right_input", (of_rows, of_biases, rights), outs, dtype, 10)
        compare("left_input", (of_columns, lefts), ins, dtype, 10)
        compare("right_factor", (of_rows, weights, of_biases, biases), outs, dtype, 100)
        compare("left_factor", (weights, of_columns), ins, dtype, 100)
    if size == "even":
        compare("right", (weights, None, rights), outs, dtype, 10)
        compare("right_input", (of_rows, None, rights), outs, dtype, 10)
        compare("right_factor", (of_rows, weights, None, None), outs, dtype, 100)


@pytest.mark.parametrize("some", [False, True], ids=["all", "kept"])
def test_through_the_public_functions(some, device):
    """Small layers come out as in plain torch, merged and back; large ones take that."""
    keeps = kept(20, device) if some else [None] * LAYERS
    how = {"dtype": torch.float32, "device": device}
    layers = [
        Factors(
            random(PARTS, 20, 20, **how),
            random(PARTS, 20, **how),
            *(random(PARTS, 20, 20, **how, scale=0.1) for _ in range(2)),
            keep,
            keep,
        )
        for keep in keeps
    ]

    def run(layers):
        merged = merge_layers(layers)
        weights, biases, middles = zip(*merged, strict=True)
        grads = unmerge_layers(layers, middles, [w.cos() for w in weights], biases)
        return [t for of_layer in (*merged, *grads) for t in of_layer]

    double = [Factors(*(f.double() for f in layer[:4]), *layer[4:]) for layer in layers]
    with triton_everywhere():
        found = run(layers)
        assert public._products(layers[0]) is compactor
        assert public._products(double[0]) is products
        large = torch.empty(1, 1, device=device).expand(1, 1025, 1024)
        assert public._products(layers[0]._replace(weight_PNK=large)) is products
    for one, other in zip(found, run(double), strict=True):
        close("merged and back", one, other, 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_and_removal_are_exact(dtype, device):
    how = {"dtype": dtype, "device": device}
    x, b = random(1, 70, 33, **how), random(1, 70, **how)
    none = torch.zeros(1, 70, 70, **how)
    (made,), (vector,) = compactor.right([x], [b], [none], [None])
    assert torch.equal(made, x)
    assert torch.equal(vector, b)
    assert torch.equal(compactor.left([x.mT], [none], [None])[0], x.mT)

    some = random(1, 70, 70, **how, scale=0.1)
    some[0, 3], some[0, :, 65] = 0, 0
    some[0, 3, 3] = some[0, 65, 65] = -1
    (made,), (vector,) = compactor.right([x], [b], [some], [None])
    assert not made[0, 3].any()
    assert vector[0, 3] == 0
    assert not compactor.left([x.mT], [some], [None])[0][..., 65].any()


def test_a_layer_that_is_not_on_16_bytes(device):
    """A view into a flat buffer, as ZeRO's partitions are."""
    how = {"dtype": torch.float32, "device": device}
    flat = torch.randn(1 + 24 * 40, device=device)
    weights = [flat[1:].view(1, 24, 40), random(1, 24, 40, **how)]
    rights = [random(1, 24, 24, **how) for _ in weights]
    compare("right", (weights, None, rights), [None, None], torch.float32, 10)


def test_not_a_number_spreads_as_far_as_it_is_read(device):
    x = torch.ones(1, 6, 40, device=device)
    x[0, 2, 35] = torch.nan
    d = torch.eye(6, device=device)[None]
    (made,), _ = compactor.right([x], None, [d], [None])
    assert made.isnan().nonzero()[:, 2].unique().tolist() == [35]
    keep = torch.tensor([0, 1], device=device)
    rows = torch.ones(1, 2, 40, device=device)
    (made,) = compactor.right_factor([rows], [torch.ones_like(x)], None, None, [keep])
    assert made[0, :2].eq(40).all()
    assert made[0, 2:].eq(0).all()
