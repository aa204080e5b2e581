"""The one forward pass: positions_of against HuggingFace's own logits."""

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from dskd.errors import ConfigError
from dskd.models.families import head_in, head_of, longest_row, positions_of
from dskd.ops import positions_ce
from tests.models.tiny import ALL, SIX, LossOf, batch, loss_of, make, without_dropout, zero3
from tests.ranks import run_ranks


@pytest.mark.parametrize("model_type", ALL)
def test_logits_are_the_models_own_at_the_supervised_positions(model_type):
    model = make(model_type).eval()
    data = batch()
    with torch.no_grad():
        rows = positions_of(model, data)
        whole_BTV = model(input_ids=data.ids_BT, attention_mask=data.mask_BT).logits
    assert rows.logits_NV.shape == (12, 43)
    torch.testing.assert_close(rows.logits_NV, whole_BTV[data.supervised_BT], rtol=0, atol=1e-6)
    assert rows.labels_N.tolist() == data.labels_BT[data.labels_BT >= 0].tolist()


@pytest.mark.parametrize("model_type", ALL)
def test_padding_changes_no_logit(model_type):
    model = make(model_type).eval()
    data = batch()
    alone = data.select(torch.tensor([2]))
    length = int(alone.mask_BT.sum())
    with torch.no_grad():
        padded_NV = positions_of(model, alone).logits_NV
        whole_BTV = model(input_ids=alone.ids_BT[:, :length]).logits
    expected_NV = whole_BTV[alone.supervised_BT[:, :length]]
    torch.testing.assert_close(padded_NV, expected_NV, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model_type", SIX)
def test_head_sees_supervised_positions_only(model_type):
    model = make(model_type)
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(model.base_model_prefix):
            module.register_forward_hook(
                lambda _, inputs, output: seen.append(inputs[0].shape[:-1])
            )
    rows = positions_of(model, batch())
    before = len(seen)
    assert rows.logits_NV is rows.logits_NV  # made when asked for, and once
    assert set(seen) == {(12,)} and len(seen) == before + 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ALL)
def test_every_parameter_is_in_the_graph_without_supervised_positions(model_type, tied):
    model = make(model_type, tie_word_embeddings=tied)
    rows = positions_of(model, batch(supervised=False))
    assert rows.logits_NV.shape == (0, 43)
    rows.logits_NV.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


class _Fused(LossOf):
    def forward(self, data):
        return positions_ce(positions_of(self.student, data)).total


def _zero3_gradients(rank, model_type, tied, supervised_ranks, memory_efficient):
    ds = zero3(2)
    ds["zero_optimization"]["memory_efficient_linear"] = memory_efficient
    model = make(model_type, ds=ds, tie_word_embeddings=tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=_Fused(model), optimizer=optimizer, config=ds)
    engine.train()
    without_dropout(model)
    for seed in range(2):  # the second pass follows the recorded order of the modules
        loss = engine(batch(supervised=rank in supervised_ranks, seed=seed))
        engine.backward(loss * 2, scale_wrt_gas=False)
    student = engine.module.student
    return {name: safe_get_full_grad(p).numpy() for name, p in student.named_parameters()}


@pytest.mark.parametrize(
    ("model_type", "tied", "memory_efficient"), [("bert", True, True), ("qwen3", False, False)]
)
def test_zero3_with_nothing_supervised_on_one_rank(model_type, tied, memory_efficient):
    """The fused loss inside the sharded head has the gradient of the plain one."""
    model = make(model_type, tie_word_embeddings=tied).eval()
    loss_of(model, batch(seed=0)).backward()
    loss_of(model, batch(seed=1)).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for grads in run_ranks(_zero3_gradients, model_type, tied, {0}, memory_efficient):
        found = {name: torch.from_numpy(grad) for name, grad in grads.items()}
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_head_is_of_a_model_type_and_an_objective():
    config = make("gpt2").config
    assert head_of(config, "causal", "x") is head_in(make("gpt2"))
    with pytest.raises(ConfigError, match=r"^x: a gpt2 is a causal LM, data.objective is masked"):
        head_of(config, "masked", "x")


@pytest.mark.parametrize("model_type", ALL)
def test_longest_row_is_as_long_as_the_positions_go(model_type):
    model = make(model_type).eval()
    longest = longest_row(model.config)
    assert longest == (30 if model_type in ("roberta", "xlm-roberta") else 32)
    model(input_ids=torch.full((1, longest), 9))
    if model_type in ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "gpt2"):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 9))
