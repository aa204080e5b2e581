"""Compactors in models of every family: the original's numbers, and teachers left as they were."""

import copy

import pytest
import torch
from torch import nn

from dskd.errors import ConfigError, DskdError
from dskd.narrowing.compactors import Compacted, CompactedEmbeddings
from dskd.narrowing.insert import insert, kept_widths, replica
from dskd.narrowing.layouts import LAYOUTS, layout_of, widths_of
from dskd.narrowing.masked_norm import MaskedNorm
from dskd.narrowing.merge import zero_removed
from dskd.narrowing.units import Vector
from dskd.narrowing.widths import Family, Widths
from tests.models.tiny import batch, loss_of, make
from tests.narrowing.wid_golden import GOLDEN, assert_matches, group_name, parameter_name, student
from tests.narrowing.wid_students import SHAPES, logits_of, small_student

MODEL = GOLDEN["model"]
CASES = {f"{c['strategy']}-{c['ln']}-{c['hard']}": c for c in MODEL["cases"]}


def golden_keep(strategy: str) -> dict[str, torch.Tensor]:
    masks = MODEL["merge"][strategy]["masks"]
    return {group_name(name): torch.tensor(mask).bool() for name, mask in masks.items()}


def golden_logits(model: nn.Module) -> torch.Tensor:
    seg = torch.tensor(MODEL["seg"])
    return model(
        input_ids=torch.tensor(MODEL["src"]), token_type_ids=seg, attention_mask=(seg > 0).long()
    ).logits


def golden_loss(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.tensor(MODEL["tgt"])
    return nn.functional.cross_entropy(logits[labels > 0], labels[labels > 0])


@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_of_the_original(case):
    golden = CASES[case]
    surgery = student(MODEL["config"], identity=False, statistics=golden["ln"])
    keep = golden_keep(golden["strategy"])
    surgery.mask(keep)
    assert not golden["hard"]
    logits = golden_logits(surgery.model)
    loss = golden_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-9)
    assert_matches(logits, golden["logits"], 1e-9)
    expected = torch.tensor(golden["logits_1_3"], dtype=torch.float64)
    torch.testing.assert_close(logits[1, 3], expected, rtol=0, atol=1e-9)
    assert len(golden["grads"]) == 16
    for name, record in golden["grads"].items():
        assert_matches(surgery.model.get_parameter(parameter_name(name)).grad, record, 1e-9)


def test_the_count_of_compactor_parameters_of_bert_base():
    H, F, layers = 768, 3072, 12
    shapes = {"hidden_size": 12, "intermediate_size": 48, "num_attention_heads": 4}
    surgery = insert(make("bert", **shapes, num_hidden_layers=1, tie_word_embeddings=False))
    units = {name: 0 for name in ("layer", "outside")}
    for name, parameter in surgery.model.named_parameters():
        if name.rpartition(".")[2] in ("left", "right"):
            scale = (F if len(parameter) == 48 else H) ** 2
            units["layer" if ".layer." in name else "outside"] += scale
    counts = GOLDEN["counts"]
    assert units["layer"] == counts["per_layer_compactor_H2_units"] * H**2
    assert layers * units["layer"] + units["outside"] == counts["compactor_params_bert_base"]


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_insertion_leaves_logits_bit_for_bit(model_type, tied):
    model = make(model_type, tie_word_embeddings=tied).eval()
    before = logits_of(model)
    own = {id(p) for p in model.parameters()}
    surgery = insert(model)
    torch.testing.assert_close(logits_of(surgery.model), before, rtol=0, atol=0)
    assert own < {id(p) for p in model.parameters()}
    added = [p for p in model.parameters() if id(p) not in own]
    assert sum(p.abs().sum() for p in added) == 0


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_insertion_leaves_the_teachers_gradients(model_type):
    model = make(model_type).eval()
    twin = insert(copy.deepcopy(model)).model
    layout = layout_of(model.config)
    loss_of(model, batch()).backward()
    loss_of(twin, batch()).backward()
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        found = twin.get_parameter(f"{layout.moved(path)}.{last}").grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_compactor_and_norm_has_one_group(model_type):
    surgery = insert(make(model_type))
    members = [member for group in surgery.groups.values() for member in group.members]
    parameters = dict(surgery.model.named_parameters(remove_duplicate=False))
    compactors = [name for name in parameters if name.endswith((".left", ".right"))]
    assert sorted(member.name for member in members) == sorted(compactors)
    assert all(member.name.endswith(member.side) for member in members)
    norms = [path for group in surgery.groups.values() for path in group.norms]
    masked = [p for p, module in surgery.model.named_modules() if isinstance(module, MaskedNorm)]
    assert sorted(norms) == sorted(masked)
    assert not any(isinstance(m, nn.LayerNorm) for m in surgery.model.modules())
    for group in surgery.groups.values():
        assert group.ranking in [m.name for m in group.members if m.side == "left"]


def test_the_originals_groups_and_ranking_tensors():
    """What is masked together, and the one matrix that ranks it."""
    groups = insert(make("bert")).groups
    layer = "bert.encoder.layer.1"
    assert {name: group.ranking for name, group in groups.items()} == {
        "R": "bert.encoder.layer.0.attention.self.value.left",
        "A.0": "bert.encoder.layer.0.attention.output.dense.left",
        "F.0": "bert.encoder.layer.0.output.dense.left",
        "A.1": f"{layer}.attention.output.dense.left",
        "F.1": f"{layer}.output.dense.left",
        "T": "cls.predictions.decoder.left",
    }
    assert [member.name for member in groups["A.1"].members] == [
        *(f"{layer}.attention.self.{what}.right" for what in ("query", "key", "value")),
        f"{layer}.attention.output.dense.left",
    ]
    vectors = ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    wanted = [f"cls.predictions.transform.{name}" for name in vectors]
    assert [vector.name for vector in groups["T"].vectors] == wanted
    # embedding, 4 readers and 2 writers a layer, head transform
    assert len(groups["R"].members) == 1 + 2 * 6 + 1
    # 2 biases and 2 norms a layer, and the embedding's norm
    assert len(groups["R"].vectors) == 2 * (2 + 4) + 2


def test_parts_of_gpt2():
    groups = insert(make("gpt2")).groups
    assert groups["R"].ranking == "transformer.h.0.attn.c_attn.left"
    assert groups["R"].part == 2
    assert Vector("transformer.h.0.attn.c_attn.bias", 3) in groups["A.0"].vectors


@pytest.mark.parametrize("model_type, shape", SHAPES)
def test_soft_is_compact_once_removed_units_are_zero(model_type, shape):
    surgery, keep = small_student(model_type, shape)
    surgery.mask(keep)
    before = logits_of(surgery.model)
    zero_removed(surgery, keep)
    soft = logits_of(surgery.model)
    assert (soft - before).abs().max() > 1e-2  # they were not
    surgery.compact(keep)
    torch.testing.assert_close(logits_of(surgery.model), soft, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type, shape", SHAPES)
def test_compact_gradients_are_those_of_the_kept_entries(model_type, shape):
    """Of removed entries they are 0; all others are what the soft model gives."""
    surgery, keep = small_student(model_type, shape)
    surgery.mask(keep)
    zero_removed(surgery, keep)
    grads = []
    for compact in (False, True):
        if compact:
            surgery.compact(keep)
        surgery.model.zero_grad()
        loss_of(surgery.model, batch()).backward()
        grads.append({n: p.grad.clone() for n, p in surgery.model.named_parameters()})
    soft, hard = grads
    for name, group in surgery.groups.items():
        for member in group.members:
            size = soft[member.name].shape[-1]
            gone = ~keep[name].repeat_interleave(size // len(keep[name]))
            for found in (soft, hard):
                grad = found[member.name]
                (grad if member.side == "left" else grad.mT)[..., gone] = 0
            close = {"rtol": 1e-4, "atol": 1e-5, "msg": member.name}
            torch.testing.assert_close(hard[member.name], soft[member.name], **close)


def test_compacted_activations_are_small():
    surgery, keep = small_student("llama", (16, 24, 1, 8))
    surgery.compact(keep)
    widths: dict[str, int] = {}
    for path, module in surgery.model.named_modules():
        if isinstance(module, (Compacted, MaskedNorm)):
            module.register_forward_hook(
                lambda module, args, out, path=path: widths.update({path: out.shape[-1]})
            )
    logits_of(surgery.model)
    first = "model.layers.0."
    assert {n.removeprefix(first): widths[n] for n in widths if n.startswith(first)} == {
        "input_layernorm": 16, "self_attn.q_proj": 16, "self_attn.k_proj": 8,
        "self_attn.v_proj": 8, "self_attn.o_proj": 16, "post_attention_layernorm": 16,
        "mlp.gate_proj": 24, "mlp.up_proj": 24, "mlp.down_proj": 16,
    }  # fmt: skip


def test_a_replica_is_the_student_in_fp32():
    surgery, _ = small_student("gpt2", (16, 64, 4, 4))
    surgery.model.to(torch.bfloat16)
    surgery.merging.forget()
    masters = {n: p.detach().float() for n, p in surgery.model.named_parameters()}
    twin = replica(surgery, masters.__getitem__)
    assert all(p.dtype == torch.float32 for p in twin.model.parameters())
    surgery.model.float()
    surgery.merging.forget()
    torch.testing.assert_close(logits_of(twin.model), logits_of(surgery.model), rtol=0, atol=0)


def test_unknown_families_and_cross_attention_are_refused():
    with pytest.raises(ConfigError, match=r"method\.kind: wid cannot .* into a modernbert"):
        insert(make("modernbert"))
    config = make("bert").config
    config.add_cross_attention = True
    with pytest.raises(ConfigError, match=r"model\.config\.add_cross_attention"):
        layout_of(config)


def test_widths_of_configs():
    assert widths_of(make("gpt2").config) == Widths(32, 128, 4, 4, 8)
    assert widths_of(make("llama").config) == Widths(32, 48, 4, 2, 8)
    assert widths_of(make("qwen3", head_dim=16).config) == Widths(32, 48, 4, 2, 16)
    assert layout_of(make("llama").config).demands == Family(rotary=True, divides=True)
    assert layout_of(make("qwen2").config).demands == Family(rotary=True)
    assert layout_of(make("roberta").config).demands == Family()


def test_kept_widths_refuse_what_no_model_is():
    surgery, keep = small_student("bert", (16, 24, 4, 4))
    config = surgery.model.config
    assert kept_widths(config, keep) == Widths(16, 24, 4, 4, 4)
    for name in ("R", "A.1", "F.0"):
        other = keep | {name: keep[name].clone()}
        other[name][other[name].nonzero()[0]] = False
        with pytest.raises(DskdError, match=f"no dense model .*{name} "):
            kept_widths(config, other)
    uneven = keep | {name: torch.arange(32) < 16 for name in ("A.0", "A.1")}
    assert kept_widths(config, uneven) == Widths(16, 24, 2, 2, 8)
    uneven |= {"A.0": torch.arange(32) % 8 >= 4}
    with pytest.raises(DskdError, match="no dense model"):
        kept_widths(config, uneven)


def test_the_embedding_sum_is_compacted_before_the_norm():
    model = insert(make("bert")).model
    first, second = model.bert.embeddings.LayerNorm
    assert isinstance(first, CompactedEmbeddings)
    assert isinstance(second, MaskedNorm)
