"""DFA and CFL against the original's numbers: losses, every gradient, layers, MMD; and padding,
groups of rows and collapsed features."""

import math

import pytest
import torch

from dskd.errors import ConfigError
from dskd.methods.alignment import CflBlock, DfaBlock, aligned_layers, cfl_terms, dfa_term, mmd
from dskd.methods.integration import vkd_term
from tests.methods.panels import PRECISIONS, cases, close, named, panel_of, tensor
from tests.training.waits import HostWaits

DFA_NAMES = {
    "t_encoder": "teacher_encoder", "t_decoder": "teacher_decoder", "s_encoder": "student_encoder"
}  # fmt: skip
CFL_NAMES = {
    "align_s": "student_encoder", "align_t": "teacher_encoders", "extractor0": "extractor.0",
    "extractor2": "extractor.2", "dec_t": "decoders",
}  # fmt: skip
INSIDE_DECODER = ("0", "2")
"""Where the original's two maps of a decoder are."""


def flat(tree, prefix=""):
    """Leaves of nested mappings and lists of them, by dotted name."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict | list):
        first = tree[0]
        if isinstance(first, dict) or isinstance(first[0], dict):
            tree = {str(index): each for index, each in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, each in tree.items()
        for name, leaf in flat(each, f"{prefix}.{key}" if prefix else key).items()
    }


def ours(name, names):
    """Our name of a parameter of a block."""
    first, *rest = name.split(".")
    if first == "dec_t":
        rest[1] = INSIDE_DECODER[int(rest[1])]
    return ".".join([names[first], *rest])


def filled(block, values, names, dtype):
    """The block with a case's parameters."""
    state = {ours(name, names): tensor(leaf, dtype) for name, leaf in flat(values).items()}
    block.to(dtype).load_state_dict(state)
    return block


def set_up(case, kind, names, dtype):
    """Blocks, the student's states (leaves), and each layer's states of all teachers."""
    inputs = case["inputs"]
    students = [tensor(each, dtype).requires_grad_() for each in inputs["student_hiddens"]]
    by_teacher = [[tensor(h, dtype) for h in each] for each in inputs["teacher_hiddens"]]
    teachers = list(zip(*by_teacher, strict=True))
    widths = [each.shape[-1] for each in teachers[0]]
    width = students[0].shape[-1]
    blocks = [filled(kind(width, widths), b, names, dtype) for b in inputs["blocks"]]
    return blocks, students, teachers


def check_gradients(case, blocks, students, names, block_name, extra):
    """Every gradient of the case is ours, and there are no others."""
    found = {f"student_hidden.{i}": each.grad for i, each in enumerate(students)}
    for index, block in enumerate(blocks):
        parameters = dict(block.named_parameters())
        for name in flat(case["inputs"]["blocks"][index]):
            found[f"{block_name(index)}.{name}"] = parameters[ours(name, names)].grad
        assert len(parameters) == len(flat(case["inputs"]["blocks"][index]))
    assert found.keys() == case["expect"]["grads"].keys()
    for name, wanted in case["expect"]["grads"].items():
        close(found[name], wanted, case, 30 * extra)


def vanilla(case, dtype):
    inputs = case["inputs"]
    student_NC = tensor(inputs["student_logits"], dtype)
    panel = panel_of(inputs, dtype)
    return vkd_term(student_NC, panel, temperature=inputs["temperature"]).total / len(student_NC)


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS)
@pytest.mark.parametrize("case", cases("dfa_loss"), ids=named)
def test_dfa(case, dtype, extra):
    inputs, expected = case["inputs"], case["expect"]
    blocks, students, teachers = set_up(case, DfaBlock, DFA_NAMES, dtype)
    mask_BT = torch.ones(students[0].shape[:2], dtype=torch.long)
    weights = {"align_weight": inputs["almal_alpha"], "reconstruction_weight": inputs["rec_alpha"]}
    term = dfa_term(blocks, students, teachers, mask_BT, **weights)
    tokens = mask_BT.sum()
    (term.total / tokens).backward()
    close(term.parts["align"] / tokens, expected["align"], case, extra)
    close(term.parts["reconstruction"] / tokens, expected["rec"], case, extra)
    kd = vanilla(case, dtype)
    close(kd, expected["kd"], case, extra)
    close(inputs["kd_alpha"] * kd + term.total / tokens, expected["total"], case, extra)
    check_gradients(case, blocks, students, DFA_NAMES, "block{}".format, extra)


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS)
@pytest.mark.parametrize("case", cases("cfl_loss"), ids=named)
def test_cfl(case, dtype, extra):
    inputs, expected = case["inputs"], case["expect"]
    blocks, students, teachers = set_up(case, CflBlock, CFL_NAMES, dtype)
    rows, _ = shape = students[0].shape[:2]
    mask_BT = torch.ones(shape, dtype=torch.long)
    weights = {"mmd_weight": inputs["almal_alpha"], "reconstruction_weight": inputs["rec_alpha"]}
    terms = cfl_terms(blocks, students, teachers, mask_BT, rows=rows, **weights)
    loss = terms["groups"].total + terms["tokens"].total / mask_BT.sum()
    loss.backward()
    close(terms["groups"].parts["mmd"], expected["mmd"], case, extra)
    found = terms["tokens"].parts["reconstruction"] / mask_BT.sum()
    close(found, expected["rec"], case, extra)
    close(inputs["kd_alpha"] * vanilla(case, dtype) + loss, expected["total"], case, extra)
    check_gradients(case, blocks, students, CFL_NAMES, "block.{}".format, extra)


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS)
@pytest.mark.parametrize("case", cases("mmd_rbf"), ids=named)
def test_mmd(case, dtype, extra):
    left_RK, right_RK = (tensor(case["inputs"][name], dtype) for name in ("x", "y"))
    found_G = mmd(left_RK[None].repeat(3, 1, 1), right_RK[None].repeat(3, 1, 1))
    close(found_G, [case["expect"]["value"]] * 3, case, extra)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_mmd_of_nearly_equal_features_keeps_its_digits_in_fp32(spread):
    """Its value does not depend on the scale; by x^2 + y^2 - 2 x y it would be noise."""
    generator = torch.Generator().manual_seed(0)
    base_1K = torch.rand(1, 1, 64, generator=generator)
    left_GRK, right_GRK = (torch.randn(1, 8, 64, generator=generator) for _ in range(2))
    near = [(base_1K + spread * each).requires_grad_() for each in (left_GRK, right_GRK + 0.3)]
    found_G = mmd(*near)
    exact_G = mmd(*(each.detach().double() for each in near))
    torch.testing.assert_close(found_G.double(), exact_G, rtol=1e-4, atol=0.0)
    found_G.sum().backward()
    assert all(each.grad.isfinite().all() and each.grad.any() for each in near)


@pytest.mark.parametrize("spread", [1.0, 1e-5, 1e-6])
def test_mmd_is_the_formula_with_its_floor(spread):
    """A distance counts as at least 1e-12, which is seen where all of them are small."""
    generator = torch.Generator().manual_seed(0)
    left, right = (spread * torch.randn(4, 3, generator=generator).double() for _ in range(2))

    def squared(a, b):
        return [float((x - y) @ (x - y)) for x in a for y in b]

    within, across = squared(left, left) + squared(right, right), squared(left, right)
    variance = (sum(within) + 2 * sum(across)) / 4 / 16

    def kernels(distances):
        widths = [variance * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
        return sum(math.exp(-max(d, 1e-12) / 2 / width) for d in distances for width in widths)

    wanted = (kernels(within) - 2 * kernels(across)) / 16
    assert variance > 1e-12 and wanted > 0
    assert mmd(left[None], right[None]).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 4, 6), (4, 1, 6)], ids=["rows", "groups"])
def test_mmd_of_one_point_is_zero_and_has_gradients(shape):
    """All rows equal, of one group or of groups of one row: nothing on the way is NaN."""
    point_GRK = torch.ones(shape, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        found_G = mmd(point_GRK, point_GRK.detach())
        assert torch.equal(found_G, torch.zeros(shape[0]))
        found_G.sum().backward()
    assert torch.equal(point_GRK.grad, torch.zeros(shape))


def test_features_that_are_all_zero_have_gradients():
    blocks, students, teachers = random_case(CflBlock)
    for block in blocks:
        for parameter in block.parameters():
            torch.nn.init.zeros_(parameter)
    mask_BT = torch.ones(4, 6, dtype=torch.long)
    found = numbers(CflBlock, blocks, students, teachers, mask_BT)
    assert found[0] == 0.0 and all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("case", cases("dfa_layer_indices"), ids=named)
def test_layers_of_the_original(case):
    inputs, expected = case["inputs"], case["expect"]
    number = None if inputs["align_number"] == -1 else inputs["align_number"]
    sizes = (inputs["n_teacher_layers"], inputs["n_student_layers"], number)
    if expected.get("error"):
        with pytest.raises(ConfigError, match=r"method\.layers: .* the rule even finds"):
            aligned_layers(*sizes, "stride", "method.layers")
        teacher, student = aligned_layers(*sizes, "even", "method.layers")
        assert len(teacher) == len(student) == (number or sizes[1])
        return
    for rule in ("stride", "even"):
        found = aligned_layers(*sizes, rule, "method.layers")
        assert found == (expected["teacher"], expected["student"])


def test_layers_at_the_same_share_of_the_depth():
    assert aligned_layers(6, 12, None, "even", "l")[0] == [6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert aligned_layers(7, 3, None, "even", "l") == ([7, 5, 2], [3, 2, 1])
    assert aligned_layers(12, 4, 2, "even", "l") == ([12, 9], [4, 3])
    assert aligned_layers(1, 4, None, "even", "l")[0] == [1, 1, 1, 1]
    assert aligned_layers(12, 4, 2, "top", "l") == ([12, 11], [4, 3])


@pytest.mark.parametrize("rule", ["even", "stride", "top"])
@pytest.mark.parametrize("number", [0, 5])
def test_a_number_of_layers_that_the_student_has_not_is_refused(rule, number):
    with pytest.raises(ConfigError, match=rf"method\.layers: {number}, but the student has 4"):
        aligned_layers(12, 4, number, rule, "method.layers")


def test_a_teacher_with_too_few_layers_from_the_top_is_refused():
    with pytest.raises(ConfigError, match="student's 4 layers, but by the rule top these are 2"):
        aligned_layers(2, 4, 3, "top", "method.layers")


def random_case(kind, rows=4, tokens=6, dtype=torch.float64):
    """Two layers' blocks and states of a student and two teachers."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        blocks = [kind(8, [8, 12]).to(dtype) for _ in range(2)]
    students, *teachers = (
        [torch.randn(rows, tokens, size, generator=generator, dtype=dtype) for _ in range(2)]
        for size in (8, 8, 12)
    )
    return blocks, students, list(zip(*teachers, strict=True))


def numbers(kind, blocks, students, teachers, mask_BT, rows=2):
    """Totals and gradients of all parameters."""
    if kind is DfaBlock:
        totals = [dfa_term(blocks, students, teachers, mask_BT).total]
    else:
        terms = cfl_terms(blocks, students, teachers, mask_BT, rows=rows)
        totals = [terms["groups"].total, terms["tokens"].total]
    parameters = [p for block in blocks for p in block.parameters()]
    return [*totals, *torch.autograd.grad(sum(totals), parameters)]


@pytest.mark.parametrize("kind", [DfaBlock, CflBlock])
def test_padding_counts_nowhere(kind):
    """Neither what stands on it nor how much of it there is."""
    blocks, students, teachers = random_case(kind)
    mask_BT = (torch.arange(6) < torch.tensor([3, 4, 4, 1])[:, None]).long()
    wanted = numbers(kind, blocks, students, teachers, mask_BT)

    def other(states_BTE):
        cut_BTE = states_BTE[:, :4].masked_fill(mask_BT[:, :4, None] == 0, 77.0)
        return torch.cat([cut_BTE, torch.full_like(states_BTE[:, :3], -9.0)], 1)

    wider_BT = torch.nn.functional.pad(mask_BT[:, :4], (0, 3))
    others = [[other(s) for s in students], [[other(t) for t in each] for each in teachers]]
    torch.testing.assert_close(numbers(kind, blocks, *others, wider_BT), wanted)


@pytest.mark.parametrize("kind", [DfaBlock, CflBlock])
def test_micro_batches_of_whole_groups_add_up(kind):
    blocks, students, teachers = random_case(kind)
    mask_BT = (torch.arange(6) < torch.tensor([3, 6, 4, 1])[:, None]).long()
    wanted = numbers(kind, blocks, students, teachers, mask_BT)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        own = [[t[part] for t in each] for each in teachers]
        halves.append(numbers(kind, blocks, [s[part] for s in students], own, mask_BT[part]))
    torch.testing.assert_close([a + b for a, b in zip(*halves, strict=True)], wanted)


def test_groups_are_consecutive_rows():
    """Two groups are not one of all rows, and what is no whole group is a defect."""
    blocks, students, teachers = random_case(CflBlock)
    mask_BT = torch.ones(4, 6, dtype=torch.long)
    two = cfl_terms(blocks, students, teachers, mask_BT, rows=2)["groups"].total
    one = cfl_terms(blocks, students, teachers, mask_BT, rows=4)["groups"].total
    assert not torch.isclose(two, one)
    with pytest.raises(AssertionError):
        cfl_terms(blocks, students, teachers, mask_BT, rows=3)


@pytest.mark.parametrize("kind", [DfaBlock, CflBlock])
def test_no_gradient_reaches_a_teacher_and_sums_are_wide(kind):
    blocks, students, teachers = random_case(kind, dtype=torch.bfloat16)
    students = [each.requires_grad_() for each in students]
    teachers = [[each.float().requires_grad_() for each in layer] for layer in teachers]
    mask_BT = torch.ones(4, 6, dtype=torch.long)
    totals = numbers(kind, blocks, students, teachers, mask_BT)
    assert all(total.dtype == torch.float32 for total in totals if total.dim() == 0)
    if kind is DfaBlock:
        dfa_term(blocks, students, teachers, mask_BT).total.backward()
    else:
        terms = cfl_terms(blocks, students, teachers, mask_BT, rows=2)
        (terms["groups"].total + terms["tokens"].total).backward()
    assert all(each.grad.isfinite().all() and each.grad.any() for each in students)
    assert all(each.grad is None for layer in teachers for each in layer)


def test_what_dfa_trains_by_which_part():
    """Alignment: the student and its map; reconstruction: the teachers' maps."""
    blocks, students, teachers = random_case(DfaBlock)
    students = [each.requires_grad_() for each in students]
    mask_BT = torch.ones(4, 6, dtype=torch.long)
    for align, trained in ((1.0, "student_encoder"), (0.0, "teacher_")):
        weights = {"align_weight": align, "reconstruction_weight": 1.0 - align}
        total = dfa_term(blocks, students, teachers, mask_BT, **weights).total
        total.backward()
        for name, parameter in blocks[0].named_parameters():
            assert parameter.grad.any() == name.startswith(trained), (align, name)
            parameter.grad = None
        assert students[0].grad.any() == (align == 1.0)
        students[0].grad = None


@pytest.mark.parametrize("kind", [DfaBlock, CflBlock])
def test_the_host_waits_for_nothing(kind):
    blocks, students, teachers = random_case(kind)
    mask_BT = torch.ones(4, 6, dtype=torch.long)
    with HostWaits() as waits:
        waits.put([mask_BT, *students, *(states for layer in teachers for states in layer)])
        waits.put(p for block in blocks for p in block.parameters())
        found = numbers(kind, blocks, students, teachers, mask_BT)
        assert all(waits.holds(each) for each in found)
    assert not waits.lines
