"""The balance loss of mixtures of experts: HuggingFace's of each row, counted over the step."""

from importlib import import_module

import pytest
import torch
from transformers import AutoConfig

from dskd.batch import Batch, Positions, Signal, Term
from dskd.errors import ConfigError
from dskd.methods.lm import LanguageModelling
from dskd.models.balance import balance_of, row_balance
from dskd.models.build import check_model
from dskd.models.configs import config_of
from dskd.models.families import positions_of
from dskd.training.objective import Objective
from tests.models.tiny import BLOCK, batch, make, settings, tokenizer

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
METHOD = LanguageModelling(kind="lm")


def logits_of(rows: int, tokens: int, layers: int = 3, experts: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (rows * tokens, experts)
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(layers)]


def huggingface(model_type: str, routers: list[torch.Tensor], mask_BT: torch.Tensor | None):
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    experts = routers[0].shape[-1]
    return module.load_balancing_loss_func(tuple(routers), experts, 2, mask_BT)


@pytest.mark.parametrize("real", [7, 5])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_of_one_row_it_is_huggingfaces(model_type: str, real: int) -> None:
    """Value and gradient; padding is left out there by the mask, too."""
    routers = logits_of(1, 7)
    mask_BT = (torch.arange(7) < real).long()[None]
    found = row_balance(routers, mask_BT, 2)
    wanted = huggingface(model_type, routers, None if real == 7 else mask_BT)
    assert found.shape == (1,) and found.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert found.item() > 2.01
    pairs = zip(*(torch.autograd.grad(x.sum(), routers) for x in (found, wanted)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_of_several_it_is_that_of_each() -> None:
    routers, mask_BT = logits_of(3, 6), (torch.arange(6) < torch.tensor([[6], [4], [1]])).long()
    found_B = row_balance(routers, mask_BT, 2)
    for row, found in enumerate(found_B):
        own = [logits.view(3, 6, 5)[row, : mask_BT[row].sum()] for logits in routers]
        assert found.item() == pytest.approx(huggingface("mixtral", own, None).item(), abs=1e-6)
    halves = [logits.view(3, 6, 5)[:2].flatten(0, 1) for logits in routers]
    assert torch.equal(row_balance(halves, mask_BT[:2], 2), found_B[:2])


def test_each_row_has_to_go_to_all_experts() -> None:
    """Four rows, each to two experts of its own: all together are in balance, none by itself is."""
    preferred = 9.0 * torch.eye(4).repeat_interleave(2, 1)[[0, 1, 2, 3]]
    routers, mask_BT = [preferred.repeat_interleave(6, 0)], torch.ones(4, 6, dtype=torch.long)
    assert huggingface("mixtral", routers, mask_BT).item() == pytest.approx(2.0, abs=1e-3)
    found_B = row_balance(routers, mask_BT, 2)
    torch.testing.assert_close(found_B, torch.full((4,), 8.0), rtol=1e-2, atol=0)


def test_it_is_computed_in_fp32_or_wider() -> None:
    half = [logits.bfloat16() for logits in logits_of(2, 6)]
    mask_BT = torch.ones(2, 6, dtype=torch.long)
    found_B = row_balance(half, mask_BT, 2)
    exact_B = row_balance([logits.double() for logits in half], mask_BT, 2)
    assert (found_B.dtype, exact_B.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(found_B.double(), exact_B, rtol=1e-6, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_rows_weigh_as_many_positions_as_they_have(model_type: str, checkpointing: bool) -> None:
    """Loss and gradient of the wrapped student against HuggingFace's forward of row by row; also
    with activations that are recomputed."""
    student = make(model_type, router_aux_loss_coef=0.3, initializer_range=0.2).train()
    rows = batch(3)
    counts_B = rows.counts_B.tolist()
    assert len(set(counts_B)) > 1 and (rows.lengths_B < rows.ids_BT.shape[1]).any()
    total, balance = torch.zeros(()), 0.0
    for row, count in enumerate(counts_B):
        one = rows.select(torch.tensor([row]))
        options = {"attention_mask": one.mask_BT, "output_router_logits": True}
        out = student(input_ids=one.ids_BT, **options)
        logprobs_NV = out.logits.flatten(0, 1)[one.positions_N].log_softmax(-1)
        total = total - logprobs_NV.gather(1, one.labels_N[:, None]).sum()
        total = total + 0.3 * count * out.aux_loss
        balance += count * out.aux_loss.item()
    wanted = torch.autograd.grad(total, list(student.parameters()))
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    objective = Objective(student, METHOD, None)
    terms = objective(rows, 0)
    assert terms.keys() == objective.counts(rows).keys() == {"tokens", "balance"}
    assert set(objective.counts(rows).values()) == {float(sum(counts_B))}
    assert terms["balance"].parts["balance"].item() == pytest.approx(balance, rel=1e-6)
    assert terms["balance"].total.item() == pytest.approx(0.3 * balance, rel=1e-6)
    found = sum(term.total for term in terms.values())
    assert found.item() == pytest.approx(total.item(), rel=1e-5)
    gradients = torch.autograd.grad(found, list(student.parameters()))
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def asked_for(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> list[bool]:
    """Whether each pass of the body keeps the logits of its routers."""
    found, body = [], model.base_model
    forward = body.forward

    def watched(*args, **options):
        out = forward(*args, **options)
        found.append(out.router_logits is not None)
        return out

    monkeypatch.setattr(body, "forward", watched)
    return found


def plain(positions: Positions, signal: Signal | None, batch: Batch, step: int) -> dict[str, Term]:
    assert positions.routers is None
    return {"other": Term(positions.logits_NV.float().sum(), {})}


def test_only_the_training_of_a_student_asks_its_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the gradient of another loss, an evaluation, a teacher, or a coefficient of 0."""
    student, rows = make("qwen3_moe"), batch(2)
    assert student.config.router_aux_loss_coef == 0.001
    objective, found = Objective(student, METHOD, None), asked_for(monkeypatch, student)
    assert objective(rows, 0).keys() == {"tokens", "balance"}
    assert objective(rows, 0, plain).keys() == {"other"}
    assert len(objective.forward_evaluation(rows, METHOD.metrics(None))) > 0
    assert positions_of(student, rows).routers is None
    assert found == [True, False, False, False]
    still = make("qwen3_moe", router_aux_loss_coef=0.0)
    objective, found = Objective(still, METHOD, None), asked_for(monkeypatch, still)
    assert objective(rows, 0).keys() == objective.counts(rows).keys() == {"tokens"}
    assert found == [False]
    assert Objective(make("llama"), METHOD, None).counts(rows).keys() == {"tokens"}


@pytest.mark.parametrize("coefficient", [-0.1, float("inf"), float("nan")])
def test_a_coefficient_that_is_none_is_refused(coefficient: float) -> None:
    config = AutoConfig.for_model("qwen3_moe", router_aux_loss_coef=coefficient)
    with pytest.raises(ConfigError, match=r"^model\.config\.router_aux_loss_coef: .* from 0 on"):
        balance_of(config)


def test_a_config_that_does_not_say_how_many_experts_is_refused() -> None:
    config = AutoConfig.for_model("llama", router_aux_loss_coef=0.01)
    with pytest.raises(
        ConfigError, match=r"a llama does not say .*\(num_experts_per_tok\); set it"
    ):
        balance_of(config)


def test_a_model_without_routers_is_refused_and_not_trained_without_a_balance() -> None:
    student = make("llama")
    student.config.router_aux_loss_coef, student.config.num_experts_per_tok = 0.01, 2
    with pytest.raises(ConfigError, match=r"0\.01, but a llama puts out no logits of its routers"):
        Objective(student, METHOD, None)(batch(2), 0)


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0, 1]}, {"router_aux_loss_coef": -1.0}])
def test_a_student_without_its_balance_is_refused_before_anything_is_made(change: dict) -> None:
    """A teacher with the same config is not: it has no balance."""
    chosen = settings("qwen3_moe", **change)
    data = {"objective": "causal", "block_size": BLOCK, "where": "model"}
    config = config_of(chosen, where="model", tokenizer=tokenizer())
    check_model(config, chosen, **data)
    with pytest.raises(ConfigError, match=r"^model\.config\.router_aux_loss_coef: "):
        check_model(config, chosen, **data, trained=True)
    good = settings("qwen3_moe")
    check_model(config_of(good, where="model", tokenizer=tokenizer()), good, **data, trained=True)
