"""A student that teaches itself: as it is, as it started, or at the average of its weights."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from dskd.batch import IGNORE, Batch, ProjectedTeacher
from dskd.engine.shards import ParameterShards
from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.methods.checks import validate
from dskd.runs.plan import check
from dskd.settings.recipe import Recipe, read
from dskd.teachers.average import Average
from dskd.teachers.teacher import FrozenTeacher, ShownUnmasked, StudentAsTeacher
from dskd.training.objective import Objective
from tests.batches import batch_of, changed
from tests.heads import logits_of

VOCABULARY, MASK = 23, 4
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SIZES["initializer_range"] = 0.5


def student(dropout: float = 0.5, dtype: torch.dtype = torch.float64) -> BertForMaskedLM:
    """A BERT of two layers with three columns of padding, in train mode."""
    own = {"num_hidden_layers": 2, "max_position_embeddings": 12}
    own |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=VOCABULARY + 3, **SIZES, **own)
    torch.manual_seed(1)
    return BertForMaskedLM(config).to(dtype).train()


def masked_batch() -> tuple[Batch, Tensor]:
    """A batch with masked places, and its rows without masks."""
    torch.manual_seed(2)
    rows_BT = torch.randint(5, VOCABULARY, (4, 9))
    chosen_BT = torch.rand(rows_BT.shape) < 0.4
    ids_BT = torch.where(chosen_BT, MASK, rows_BT)
    labels_BT = torch.where(chosen_BT, rows_BT, IGNORE)
    assert 5 < chosen_BT.sum() < 30
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 7:] = 0
    labels_BT[1, 7:] = IGNORE
    return batch_of(labels_BT, ids_BT=ids_BT, mask_BT=mask_BT), rows_BT


def plain_logits(model: torch.nn.Module, ids_BT: Tensor, batch: Batch) -> Tensor:
    """[N, V] of HuggingFace's own forward in eval mode, without gradient."""
    was = model.training
    with torch.no_grad():
        logits_BTV = model.eval()(input_ids=ids_BT, attention_mask=batch.mask_BT).logits
    model.train(was)
    return logits_BTV[batch.supervised_BT][:, :VOCABULARY]


def test_it_sees_what_the_masks_hide():
    model, (batch, rows_BT) = student(), masked_batch()
    signal = ShownUnmasked(StudentAsTeacher(model, VOCABULARY))(batch)
    assert isinstance(signal, ProjectedTeacher)
    expected_NV = plain_logits(model, rows_BT, batch)
    torch.testing.assert_close(logits_of(signal), expected_NV, rtol=1e-12, atol=1e-12)
    assert not signal.hidden_NE.requires_grad
    seen_NV = logits_of(StudentAsTeacher(model, VOCABULARY)(batch))
    torch.testing.assert_close(seen_NV, plain_logits(model, batch.ids_BT, batch))
    assert (seen_NV - expected_NV).abs().max() > 0.1


def test_a_causal_student_sees_its_row_as_it_is():
    """Its labels are the next tokens, which are no input in the place of the last."""
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **SIZES)
    model = LlamaForCausalLM(config).double().train()
    _, rows_BT = masked_batch()
    labels_BT = torch.full_like(rows_BT, IGNORE)
    labels_BT[:, :-1] = rows_BT[:, 1:]
    batch = batch_of(labels_BT, ids_BT=rows_BT)
    found_NV = logits_of(StudentAsTeacher(model, VOCABULARY)(batch))
    torch.testing.assert_close(found_NV, plain_logits(model, rows_BT, batch))


def test_modes_and_random_numbers_stay_as_they_were():
    model, (batch, _) = student(), masked_batch()
    model.bert.encoder.layer[1].eval()  # a mixture, as somebody may have frozen a part
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    before = torch.get_rng_state()
    ShownUnmasked(StudentAsTeacher(model, VOCABULARY))(batch)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_put_back_after_an_error():
    model, (batch, _) = student(), masked_batch()
    beyond = torch.full_like(batch.ids_BT, VOCABULARY + 9)
    with pytest.raises(IndexError):
        StudentAsTeacher(model, VOCABULARY)(changed(batch, ids_BT=beyond))
    assert all(module.training for module in model.modules())


def test_the_loss_of_the_paper_through_the_whole_model():
    """Loss and gradients of a student with dropout, against autograd on HuggingFace's logits."""
    model, (batch, rows_BT) = student(), masked_batch()
    teacher = ShownUnmasked(StudentAsTeacher(model, VOCABULARY))
    objective = Objective(model, build_method({"kind": "self_evolution"}), teacher)
    torch.manual_seed(3)
    loss, parts = objective(batch, 0)["tokens"]
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    reference_NV = plain_logits(model, rows_BT, batch).softmax(1)
    torch.manual_seed(3)  # the reference took no random numbers
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    logprobs_NV = logits_BTV[batch.supervised_BT].log_softmax(1)
    ce = -logprobs_NV.gather(1, batch.labels_N[:, None]).sum()
    kl = kl_div(logprobs_NV[:, :VOCABULARY], reference_NV, reduction="sum")
    (0.9 * ce + 0.1 * kl).backward()
    assert parts["ce"].item() == pytest.approx(ce.item(), rel=1e-9)
    assert parts["kl"].item() == pytest.approx(kl.item(), rel=1e-9)
    assert loss.item() == pytest.approx((0.9 * ce + 0.1 * kl).item(), rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-9, msg=name)


# ---- the average ---------------------------------------------------------------------------------


def shards_of(model: torch.nn.Module) -> ParameterShards:
    parameters = dict(model.named_parameters())
    return ParameterShards(parameters, torch.optim.SGD(parameters.values()), gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_average_moves_and_is_kept(tmp_path, dtype):
    """The closed form of three steps; the fp32 mean moves where a bf16 one would stand still."""
    model, replica = student(dtype=torch.float32), student(dtype=dtype)
    average = Average(replica, 0.99)
    FrozenTeacher(replica, VOCABULARY)  # freezes it, as the run does
    name = "bert.encoder.layer.0.output.dense.weight"
    weight = model.get_parameter(name)
    expected = replica.get_parameter(name).float().clone()
    for step in range(3):
        with torch.no_grad():
            weight.add_(0.01)
        average.after_step(shards_of(model), step, 0.1)
        expected = 0.99 * expected + 0.01 * weight.detach()
    found = replica.get_parameter(name)
    assert found.dtype == dtype
    rtol = 1e-6 if dtype == torch.float32 else 0.008
    torch.testing.assert_close(found, expected.to(dtype), rtol=rtol, atol=1e-7)
    average.save(tmp_path)
    stored = load_file(tmp_path / "average.safetensors")
    torch.testing.assert_close(stored[name], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(stored[name], student(dtype=torch.float32).get_parameter(name))
    fresh = student(dtype=dtype)
    again = Average(fresh, 0.99)
    again.load(tmp_path)
    for one in (average, again):
        one.after_step(shards_of(model), 3, 0.1)
    for key, value in replica.named_parameters():
        assert torch.equal(value, fresh.get_parameter(key)), key


# ---- what is refused -----------------------------------------------------------------------------

OWN = "method={kind: self_evolution}"


def problem(*words: str) -> str:
    recipe = read(None, [OWN, *words])
    methods = {name: build_method(run.method) for name, run in recipe.runs.items()}
    with pytest.raises(ConfigError) as caught:
        check(recipe, methods, world=1)
    return str(caught.value)


def test_settings_of_the_frozen_copy_are_refused_elsewhere():
    for weights in ("current", "average"):
        teacher = f"teacher={{kind: self, weights: {weights}, deepspeed: zero3, precision: fp32}}"
        assert problem(teacher).splitlines() == [
            f"teacher.deepspeed: zero3 shards a frozen copy, but teacher.weights is {weights}",
            f"teacher.precision: is of a frozen copy; with teacher.weights {weights} it is the"
            " student's",
        ]
    wrong = "teacher={kind: self, weights: frozen, deepspeed: zero2}"
    assert "a teacher's must be 3" in problem(wrong)


def test_no_average_of_what_cannot_be_followed():
    sizes = "hidden_size: 32, every: 1, ramp: 2, anneal: 2"
    method = f"method={{kind: wid, {sizes}, inherit: {{steps: 5}}}}"
    average, model = "teacher={kind: self, weights: average}", "model={path: nobody/here}"
    refused = problem(method, average, model)
    assert refused.startswith("teacher.weights: average, but method wid makes")
    on_disk = problem(average, "deepspeed=zero3_nvme")
    assert on_disk.startswith("teacher.weights: average, but zero3_nvme keeps the weights")
    recipe: Recipe = read(None, [method, model, "teacher={kind: self, weights: frozen}"])
    run = recipe.runs["run"]
    check(recipe, {"run": build_method(run.method)}, world=1)
    validate(run, build_method(run.method), world=2)
